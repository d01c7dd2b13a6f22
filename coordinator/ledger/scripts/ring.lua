-- Record doorbells as outstanding, as many as the limit leaves room for.
-- Keys: bells:* (zset by ms of ringing, written).
-- ARGV: role, limit, ttl in ms, bells.
-- Returns the bells to send.
local key, answer = P .. 'bells:' .. ARGV[1], {}
redis.call('ZREMRANGEBYSCORE', key, '-inf', int(now_ms - tonumber(ARGV[3])))
local room = tonumber(ARGV[2]) - redis.call('ZCARD', key)
for i = 4, math.min(#ARGV, 3 + room) do
  redis.call('ZADD', key, int(now_ms), ARGV[i])
  answer[#answer + 1] = ARGV[i]
end
return answer
