-- Groups with remembered recovery points, and how many of each.
-- Keys: groups:*, epochs:* (read).
-- ARGV: repository.
local answer = {}
for _, group in ipairs(redis.call('SMEMBERS', P .. 'groups:' .. ARGV[1])) do
  answer[#answer + 1] = { group, redis.call('ZCARD', P .. 'epochs:' .. ARGV[1] .. ':' .. group) }
end
return answer
