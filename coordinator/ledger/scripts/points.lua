-- Recovery points of a group, ascending.
-- Keys: epochs:*, points:* (read).
-- ARGV: repository, group, the epoch after which to begin, how many at most.
local answer = {}
for _, epoch in ipairs(redis.call('ZRANGEBYSCORE', P .. 'epochs:' .. ARGV[1] .. ':' .. ARGV[2],
    '(' .. ARGV[3], '+inf', 'LIMIT', 0, ARGV[4])) do
  answer[#answer + 1] = redis.call('HGET', P .. 'points:' .. ARGV[1], ARGV[2] .. '@' .. epoch)
end
return answer
