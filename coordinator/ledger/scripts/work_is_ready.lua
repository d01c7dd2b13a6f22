-- How many units could be claimed now.
-- Keys: run, hold, runnable, ready:*, job:* (read).
-- ARGV: where to stop counting.
local most, total = tonumber(ARGV[1]), 0
if held_back() then
  return 0
end
for _, job in ipairs(redis.call('ZRANGE', P .. 'runnable', 0, most - 1)) do
  local units = redis.call('LLEN', ready_key(job))
  local f = redis.call('HMGET', job_key(job), 'max_writers', 'units_leased')
  if f[1] ~= '0' then
    units = math.min(units, tonumber(f[1]) - tonumber(f[2]))
  end
  total = total + units
  if total >= most then
    return most
  end
end
return total
