-- One step of the control loop, or a verb of an operator.
-- Keys: leader (read), job:*, unit:*, ready:*, leased:*, leases, suspects:*, quarantined:*, trash,
--   incarnations, active, concluded, targets, runnable, turn, events, wake (written).
-- ARGV: job id, version, generation or "", nonce, 1 to drop units, 1 to retry given-up ones, kind of a new unit or "",
--   its pass, number of changes, field and value of each, then name and JSON of each event.
-- Returns {"ok", fields…}, {"deposed"}, {"missing"} or {"conflict"}.
local job, key = ARGV[1], job_key(ARGV[1])
if ARGV[3] ~= '' and deposed(ARGV[3], ARGV[4]) then
  return { 'deposed' }
end
local before = redis.call('HMGET', key, 'version', 'state', 'speed')
if not before[1] then
  return { 'missing' }
end
if before[1] ~= ARGV[2] then
  return { 'conflict' }
end
if ARGV[5] == '1' then
  forget_units(job)
end
if ARGV[6] == '1' then
  retry_quarantined(job)
end
local last = 9 + 2 * tonumber(ARGV[9])
if last > 9 then
  redis.call('HSET', key, unpack(ARGV, 10, last))
end
local f = redis.call('HMGET', key, 'state', 'speed')
local state = f[1]
if state ~= before[2] or f[2] ~= before[3] or ARGV[5] == '1' then
  restart_rate(key)
end
if state ~= before[2] then
  redis.call(state == 'concluded' and 'SREM' or 'SADD', P .. 'active', job)
  redis.call('ZREM', P .. 'concluded', job)
  if state == 'concluded' then
    redis.call('ZADD', P .. 'concluded', int(now_us), job)
    for target in string.gmatch(redis.call('HGET', key, '_targets') or '', '[^\n]+') do
      if redis.call('HGET', P .. 'targets', target) == job then
        redis.call('HDEL', P .. 'targets', target)
      end
    end
    redis.call('HDEL', key, '_targets')
  end
end
-- As QEMU does: a job is said to be completed or cancelled before it is concluded, and to be ready before the
-- event that says so.
if state == 'concluded' then
  emit_all(job, last + 1)
end
if state ~= before[2] then
  emit(job, 'JOB_STATUS_CHANGE', '{"status":"' .. state .. '"}')
end
if state ~= 'concluded' then
  emit_all(job, last + 1)
end
if ARGV[7] ~= '' then
  create_unit(job, ARGV[7], ARGV[8], 0, 0, 0, '')
end
refresh(job)
announce(job)
return { 'ok', redis.call('HGETALL', key) }
