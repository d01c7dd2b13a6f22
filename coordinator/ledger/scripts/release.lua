-- Give a unit back.
-- Keys: unit:*, leases, leased:*, ready:*, delayed, quarantined:*, job:*, runnable, turn, events,
--   wake (written).
-- ARGV: job, unit, token, remaining extents, bytes done, bytes read, bytes sent, 1 to count the attempt,
--   delay in ms, max attempts, number of changes, field and value of each, then name and JSON of each event.
-- Returns "ok", "stale" or "empty" (a copy or compare unit without remaining extents).
local job, unit = ARGV[1], ARGV[2]
local key, record = job_key(job), unit_key(job, unit)
if not holds(job, unit, ARGV[3]) then
  return 'stale'
end
local f = redis.call('HMGET', record, 'bytes', 'counted', 'expired')
if tonumber(f[1]) > 0 and ARGV[4] == '' then
  return 'empty'
end
-- A zombie may still write anywhere in a unit whose lease expired: all of it is done again by one holder,
-- whose digest then covers all that the zombie can have spoilt.
if f[3] == '0' and tonumber(f[1]) > 0 then
  local done = math.min(tonumber(ARGV[5]), tonumber(f[1]) - tonumber(f[2]))
  redis.call('HSET', record, 'remaining', ARGV[4])
  add(record, 'counted', done)
  add(key, 'offset', done)
end
add(key, 'bytes_read', tonumber(ARGV[6]))
add(key, 'bytes_sent', tonumber(ARGV[7]))
add(key, 'pass_sent', tonumber(ARGV[7]))
add(record, 'failures', tonumber(ARGV[8]))
drop_lease(job, unit)
local changes = tonumber(ARGV[11])
if changes > 0 then
  redis.call('HSET', key, unpack(ARGV, 12, 11 + 2 * changes))
end
local delay = tonumber(ARGV[9])
if worn_out(job, unit, tonumber(ARGV[10])) then
  quarantine(job, unit)
else
  redis.call('HINCRBY', key, 'units_ready', 1)
  if delay > 0 then
    redis.call('HSET', record, 'state', 'delayed')
    redis.call('ZADD', P .. 'delayed', int(now_ms + delay), job .. '/' .. unit)
  else
    append_ready(job, unit)
  end
  if changes > 0 then
    announce(job)
  else
    announce_if_idle(job)
  end
end
emit_all(job, 12 + 2 * changes)
refresh(job)
return 'ok'
