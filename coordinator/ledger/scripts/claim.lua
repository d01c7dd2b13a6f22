-- Lease the next ready unit, round robin over the runnable jobs.
-- Keys: run, hold (read), runnable, turn, ready:*, unit:*, leased:*, leases, job:* (written).
-- ARGV: worker, token, lease in ms.
-- Returns {job, unit, kind, pass, start, end, extents, failures, expired, rewrite}, or nil.
if held_back() then
  return nil
end
local next = redis.call('ZRANGE', P .. 'runnable', 0, 0)
if not next[1] then
  return nil
end
local job = next[1]
local unit = redis.call('LPOP', ready_key(job)) -- a runnable job has a ready unit, see refresh
local key, over = unit_key(job, unit), int(now_ms + tonumber(ARGV[3]))
local f = redis.call('HMGET', key, 'kind', 'pass', 'start', 'end', 'remaining', 'extents', 'failures', 'expired',
  'rewrite', 'bytes')
-- Copy units in the order of their claims. Plan and settle units come last: they write nothing that could be lost.
local number = f[10] == '0' and 'inf' or redis.call('HINCRBY', job_key(job), '_claims', 1)
redis.call('HSET', key, 'state', 'leased', 'token', ARGV[2], 'until', over, 'worker', ARGV[1])
redis.call('ZADD', P .. 'leases', over, job .. '/' .. unit)
redis.call('ZADD', P .. 'leased:' .. job, number, unit)
redis.call('HINCRBY', job_key(job), 'units_ready', -1)
redis.call('HINCRBY', job_key(job), 'units_leased', 1)
redis.call('ZREM', P .. 'runnable', job)
refresh(job)
return { job, unit, f[1], f[2], f[3], f[4], f[5] or f[6], f[7], f[8], f[9] }
