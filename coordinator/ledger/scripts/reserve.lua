-- The holder of a plan unit reserves its job's target, so that no two active jobs write one disk.
-- Keys: unit:*, active (read), targets, job:* (written).
-- ARGV: job, unit, token, a name of the target without a line feed.
-- Returns the id of the job that has it: this one, or the other; nil if stale.
local job, key = ARGV[1], job_key(ARGV[1])
if not holds(job, ARGV[2], ARGV[3]) then
  return nil
end
local owner = redis.call('HGET', P .. 'targets', ARGV[4])
if owner and owner ~= job and redis.call('SISMEMBER', P .. 'active', owner) == 1 then
  return owner
end
redis.call('HSET', P .. 'targets', ARGV[4], job)
redis.call('HSET', key, '_targets', (redis.call('HGET', key, '_targets') or '') .. ARGV[4] .. '\n')
return job
