-- What the holder of a unit found when it opened source and target.
-- Keys: unit:* (read), job:*, runnable, turn, wake (written).
-- ARGV: job, unit, token, then fields and values.
-- Returns 1, or 0 if stale.
local job, unit = ARGV[1], ARGV[2]
if not holds(job, unit, ARGV[3]) then
  return 0
end
if ARGV[4] then
  redis.call('HSET', job_key(job), unpack(ARGV, 4))
end
refresh(job)
announce(job)
return 1
