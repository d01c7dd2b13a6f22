-- The mark of the newest recording of a recovery point.
-- Keys: marks (read).
return tonumber(redis.call('GET', P .. 'marks') or 0)
