-- Create a job, unless it exists.
-- Keys: leader (read), idem:*, job:*, jobs, active, incarnations, events, wake (written).
-- ARGV: job id, spec as JSON, idempotency key or "", generation or "", nonce, then fields and values of the new record.
-- Returns {"ok", fields…} of the job that was created or existed, {"refused", job id} or {"deposed"}.
local job, spec, idem = ARGV[1], ARGV[2], ARGV[3]
if ARGV[4] ~= '' and deposed(ARGV[4], ARGV[5]) then
  return { 'deposed' }
end
if idem ~= '' then
  local before = redis.call('GET', P .. 'idem:' .. idem)
  if before and redis.call('EXISTS', job_key(before)) == 1 then
    job = before
  end
end
local key = job_key(job)
local existing = redis.call('HGET', key, 'spec')
if existing and existing ~= spec then
  return { 'refused', job }
end
if not existing then
  redis.call('HSET', key, unpack(ARGV, 6))
  redis.call('HSET', key, 'id', job, 'spec', spec, 'created_at', now_s, 'version', 1,
    '_incarnation', redis.call('INCR', P .. 'incarnations'), '_next_unit', 0, '_claims', 0)
  redis.call('ZADD', P .. 'jobs', int(now_us), job)
  redis.call('SADD', P .. 'active', job)
  emit(job, 'JOB_STATUS_CHANGE', '{"status":"created"}')
  wake(job)
end
if idem ~= '' then
  redis.call('SET', P .. 'idem:' .. idem, job, 'EX', 86400)
end
return { 'ok', redis.call('HGETALL', key) }
