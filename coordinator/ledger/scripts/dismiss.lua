-- Forget a concluded job.
-- Keys: leader (read), job:*, unit:*, ready:*, leased:*, leases, suspects:*, quarantined:*, trash, incarnations,
--   bucket:*, jobs, active, concluded, runnable, events, wake (written).
-- ARGV: job id, version, generation or "", nonce.
-- Returns "ok", "deposed", "missing", "conflict" or the state that forbids it.
local job = ARGV[1]
if ARGV[3] ~= '' and deposed(ARGV[3], ARGV[4]) then return 'deposed' end
local f = redis.call('HMGET', job_key(job), 'version', 'state')
if not f[1] then return 'missing' end
if f[1] ~= ARGV[2] then return 'conflict' end
if f[2] ~= 'concluded' then return f[2] end
forget_units(job)
redis.call('UNLINK', job_key(job), P .. 'bucket:' .. job)
for _, set in ipairs({ 'jobs', 'concluded', 'runnable', 'wake' }) do
  redis.call('ZREM', P .. set, job)
end
redis.call('SREM', P .. 'active', job)
emit(job, 'JOB_STATUS_CHANGE', '{"status":"null"}') -- QAPI's name for the state of a job that is no more
return 'ok'
