-- Give a unit back.
-- Keys: unit:*, leases, leased:*, recent:*, suspects:*, ready:*, delayed, quarantined:*, job:*, runnable, turn,
--   events, wake (written).
-- ARGV: job, unit, token, remaining extents, bytes done, bytes read, bytes sent, 1 to count the attempt,
--   1 if a flush failed, delay in ms, max attempts, number of changes, field and value of each, then name and JSON
--   of each event.
-- Returns "ok", "stale" or "empty" (a copy or compare unit without remaining extents).
local job, unit = ARGV[1], ARGV[2]
local key, record = job_key(job), unit_key(job, unit)
if not holds(job, unit, ARGV[3]) then
  return 'stale'
end
local f = redis.call('HMGET', record, 'bytes', 'counted', 'expired', 'spoilt')
local copies = tonumber(f[1]) > 0
if copies and ARGV[4] == '' then
  return 'empty'
end
-- A zombie may still write anywhere in a unit whose lease expired: all of it is done again by one holder,
-- whose digest then covers all that the zombie can have spoilt. All of a spoilt one is ready to be done already.
if f[3] == '0' and not f[4] and copies then
  local done = math.min(tonumber(ARGV[5]), tonumber(f[1]) - tonumber(f[2]))
  redis.call('HSET', record, 'remaining', ARGV[4])
  add(record, 'counted', done)
  advance(key, done)
  if done > 0 then
    remember_flushed(job, unit)
  end
end
add(key, 'bytes_read', tonumber(ARGV[6]))
add(key, 'bytes_sent', tonumber(ARGV[7]))
add(key, 'pass_sent', tonumber(ARGV[7]))
add(record, 'failures', tonumber(ARGV[8]))
if copies and ARGV[9] == '1' then
  lose_flush(job, unit)
end
drop_lease(job, unit)
local changes = tonumber(ARGV[12])
if changes > 0 then
  redis.call('HSET', key, unpack(ARGV, 13, 12 + 2 * changes))
end
local delay = tonumber(ARGV[10])
if worn_out(job, unit, tonumber(ARGV[11])) then
  quarantine(job, unit, #ARGV > 12 + 2 * changes and ARGV[#ARGV] or '')
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
emit_all(job, 13 + 2 * changes)
refresh(job)
return 'ok'
