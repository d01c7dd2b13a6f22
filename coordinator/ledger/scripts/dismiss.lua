-- Forget a concluded job.
-- Keys: job:*, unit:*, ready:*, leased:*, leases, suspects:*, quarantined:*, trash, incarnations, bucket:*,
--   jobs, active, runnable, wake (written).
-- ARGV: job id, version.
-- Returns "ok", "missing", "conflict" or the state that forbids it.
local job = ARGV[1]
local f = redis.call('HMGET', job_key(job), 'version', 'state')
if not f[1] then return 'missing' end
if f[1] ~= ARGV[2] then return 'conflict' end
if f[2] ~= 'concluded' then return f[2] end
forget_units(job)
redis.call('UNLINK', job_key(job), P .. 'bucket:' .. job)
for _, set in ipairs({ 'jobs', 'runnable', 'wake' }) do
  redis.call('ZREM', P .. set, job)
end
redis.call('SREM', P .. 'active', job)
return 'ok'
