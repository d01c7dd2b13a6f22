-- A worker leaves.
-- Keys: workers, worker_facts (written).
-- ARGV: worker.
redis.call('ZREM', P .. 'workers', ARGV[1])
redis.call('HDEL', P .. 'worker_facts', ARGV[1])
