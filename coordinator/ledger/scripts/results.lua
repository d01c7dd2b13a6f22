-- What the finished units of a job's pass left.
-- Keys: results:* (read).
-- ARGV: job.
return redis.call('LRANGE', P .. 'results:' .. ARGV[1], 0, -1)
