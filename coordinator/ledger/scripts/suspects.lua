-- Done units one of whose leases had expired, for the holder of a settle unit.
-- Keys: unit:*, suspects:* (read).
-- ARGV: job, unit, token, quarantine in ms.
-- Returns {unit, extents, digest, ms to wait} of each; nothing if stale.
local answer = {}
if not holds(ARGV[1], ARGV[2], ARGV[3]) then
  return answer
end
for _, unit in ipairs(redis.call('SMEMBERS', P .. 'suspects:' .. ARGV[1])) do
  local f = redis.call('HMGET', unit_key(ARGV[1], unit), 'remaining', 'extents', 'digest', 'expired_at')
  local wait = math.max(0, tonumber(f[4]) + tonumber(ARGV[4]) - now_ms)
  answer[#answer + 1] = { unit, f[1] or f[2], f[3], wait }
end
return answer
