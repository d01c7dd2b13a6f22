-- Extend a lease.
-- Keys: unit:*, leases (written), job:* (read).
-- ARGV: job, unit, token, lease in ms.
-- Returns {held, run, speed, force}.
local job, unit = ARGV[1], ARGV[2]
if not holds(job, unit, ARGV[3]) then
  return { 0, 0, 0, 0 }
end
local over = int(now_ms + tonumber(ARGV[4]))
redis.call('HSET', unit_key(job, unit), 'until', over)
redis.call('ZADD', P .. 'leases', over, job .. '/' .. unit)
local f = redis.call('HMGET', job_key(job), 'speed', 'cancel_requested')
return { 1, may_run(job) and 1 or 0, f[1], f[2] == 'force' and 1 or 0 }
