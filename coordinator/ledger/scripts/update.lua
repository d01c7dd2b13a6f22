-- One step of the control loop, or a verb of an operator.
-- Keys: leader (read), job:*, unit:*, ready:*, leased:*, leases, suspects:*, quarantined:*, trash,
--   incarnations, active, targets, runnable, turn, events, wake (written).
-- ARGV: job id, version, generation or "", nonce, 1 to drop units, kind of a new unit or "", its pass,
--   number of changes, field and value of each, then name and JSON of each event.
-- Returns {"ok", fields…}, {"deposed"}, {"missing"} or {"conflict"}.
local job, key = ARGV[1], job_key(ARGV[1])
if ARGV[3] ~= '' and deposed(ARGV[3], ARGV[4]) then
  return { 'deposed' }
end
local before = redis.call('HMGET', key, 'version', 'state')
if not before[1] then
  return { 'missing' }
end
if before[1] ~= ARGV[2] then
  return { 'conflict' }
end
if ARGV[5] == '1' then
  forget_units(job)
end
local last = 8 + 2 * tonumber(ARGV[8])
if last > 8 then
  redis.call('HSET', key, unpack(ARGV, 9, last))
end
local state = redis.call('HGET', key, 'state')
if state ~= before[2] then
  redis.call(state == 'concluded' and 'SREM' or 'SADD', P .. 'active', job)
  if state == 'concluded' then
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
if ARGV[6] ~= '' then
  create_unit(job, ARGV[6], ARGV[7], 0, 0, 0, '')
end
refresh(job)
announce(job)
return { 'ok', redis.call('HGETALL', key) }
