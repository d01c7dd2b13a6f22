-- A worker lives until its time is over or it says so again.
-- Keys: workers (zset by ms of expiry), worker_facts (hash of "slots role"); written.
-- ARGV: worker, role, slots, ttl in ms.
for _, dead in ipairs(redis.call('ZRANGEBYSCORE', P .. 'workers', '-inf', int(now_ms))) do
  redis.call('ZREM', P .. 'workers', dead)
  redis.call('HDEL', P .. 'worker_facts', dead)
end
redis.call('ZADD', P .. 'workers', int(now_ms + tonumber(ARGV[4])), ARGV[1])
redis.call('HSET', P .. 'worker_facts', ARGV[1], ARGV[3] .. ' ' .. ARGV[2])
