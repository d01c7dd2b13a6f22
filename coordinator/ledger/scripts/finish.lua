-- A unit is done.
-- Keys: unit:*, done:*, results:*, leases, leased:*, recent:*, suspects:*, ready:*, job:*, runnable, turn, wake (written).
-- ARGV: job, unit, token, bytes read, bytes sent, digest, result or "".
-- Returns "done", "already", "stale", or "again": a flush failed meanwhile that others may not have been told of.
local job, unit, token, key = ARGV[1], ARGV[2], ARGV[3], job_key(ARGV[1])
if not holds(job, unit, token) then
  return redis.call('GET', P .. 'done:' .. token) == job .. '/' .. unit and 'already' or 'stale'
end
if redis.call('HGET', unit_key(job, unit), 'spoilt') == '1' then
  drop_lease(job, unit)
  redis.call('HINCRBY', key, 'units_ready', 1)
  append_ready(job, unit)
  announce_if_idle(job)
  refresh(job)
  return 'again'
end
local kind = complete_unit(job, unit, token, ARGV[6])
add(key, 'bytes_read', tonumber(ARGV[4]))
add(key, 'bytes_sent', tonumber(ARGV[5]))
add(key, 'pass_sent', tonumber(ARGV[5]))
if ARGV[7] ~= '' then
  redis.call('RPUSH', P .. 'results:' .. job, ARGV[7])
end
local RECORDED = { plan = 'plan_done', settle = 'settled', task = 'settled', publish = 'published', abandon = 'abandoned' }
if RECORDED[kind] then
  redis.call('HSET', key, RECORDED[kind], 1)
  announce(job)
else
  announce_if_idle(job)
end
refresh(job)
return 'done'
