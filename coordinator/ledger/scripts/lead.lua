-- Become or stay leader.
-- Keys: leader (hash, written).
-- ARGV: nonce, ttl in ms, least generation already used elsewhere.
-- Returns the generation, or 0 while another leads.
local nonce, ttl, at_least = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local f = redis.call('HMGET', P .. 'leader', 'generation', 'nonce', 'until')
local generation = tonumber(f[1] or 0)
if f[2] and f[2] ~= nonce and tonumber(f[3]) > now_ms then
  return 0
end
if f[2] ~= nonce or generation <= at_least then
  generation = math.max(generation, at_least) + 1
end
redis.call('HSET', P .. 'leader', 'generation', int(generation), 'nonce', nonce, 'until', int(now_ms + ttl))
return generation
