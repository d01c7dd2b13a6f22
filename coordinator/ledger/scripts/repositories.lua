-- Repositories of which something is remembered.
-- Keys: repositories (read).
return redis.call('HGETALL', P .. 'repositories')
