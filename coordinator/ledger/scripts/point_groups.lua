-- Groups with remembered recovery points.
-- Keys: groups:* (read).
-- ARGV: repository.
return redis.call('SMEMBERS', P .. 'groups:' .. ARGV[1])
