-- Epochs of the remembered recovery points of a group, ascending.
-- Keys: epochs:* (read).
-- ARGV: repository, group.
return redis.call('ZRANGE', P .. 'epochs:' .. ARGV[1] .. ':' .. ARGV[2], 0, -1)
