-- A unit is done.
-- Keys: unit:*, done:*, leases, leased:*, suspects:*, job:*, runnable, turn, wake (written).
-- ARGV: job, unit, token, bytes read, bytes sent, digest.
-- Returns "done", "already" or "stale".
local job, unit, token, key = ARGV[1], ARGV[2], ARGV[3], job_key(ARGV[1])
if not holds(job, unit, token) then
  return redis.call('GET', P .. 'done:' .. token) == job .. '/' .. unit and 'already' or 'stale'
end
local kind = complete_unit(job, unit, token, ARGV[6])
add(key, 'bytes_read', tonumber(ARGV[4]))
add(key, 'bytes_sent', tonumber(ARGV[5]))
add(key, 'pass_sent', tonumber(ARGV[5]))
local RECORDED = { plan = 'plan_done', settle = 'settled' }
if RECORDED[kind] then
  redis.call('HSET', key, RECORDED[kind], 1)
  announce(job)
else
  announce_if_idle(job)
end
refresh(job)
return 'done'
