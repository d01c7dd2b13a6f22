-- The workers that are alive.
-- Keys: workers, worker_facts (read).
-- Returns {worker, "slots role"} of each.
local answer = {}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', P .. 'workers', '(' .. int(now_ms), '+inf')) do
  answer[#answer + 1] = { worker, redis.call('HGET', P .. 'worker_facts', worker) }
end
return answer
