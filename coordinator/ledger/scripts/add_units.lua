-- The holder of a plan unit adds units and moves the plan's cursor.
-- Keys: unit:*, job:*, ready:*, runnable, turn, wake (written).
-- ARGV: job, unit, token, kind, cursor, new cursor, then start, end, bytes and extents of each unit.
-- Returns 1, or 0 if stale or the cursor is elsewhere.
local job, unit, key = ARGV[1], ARGV[2], job_key(ARGV[1])
if not holds(job, unit, ARGV[3]) then
  return 0
end
local plan = redis.call('HMGET', unit_key(job, unit), 'kind', 'pass')
if plan[1] ~= 'plan' or redis.call('HGET', key, 'plan_cursor') ~= ARGV[5] then
  return 0
end
local bytes = 0
for i = 7, #ARGV, 4 do
  create_unit(job, ARGV[4], plan[2], ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3])
  bytes = bytes + tonumber(ARGV[i + 2])
end
redis.call('HSET', key, 'plan_cursor', ARGV[6])
add(key, 'len', bytes)
refresh(job)
wake(job) -- other movers are rung for while the plan still streams
return 1
