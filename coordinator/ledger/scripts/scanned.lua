-- All of a repository was looked at.
-- Keys: repositories (written).
-- ARGV: repository, URI.
redis.call('HSET', P .. 'repositories', ARGV[1], now_s .. ' ' .. ARGV[2])
