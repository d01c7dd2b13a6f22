-- The epoch that a group opened last.
-- Keys: epoch_numbers, epoch:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*, epoch_readable:* (read).
-- ARGV: group.
-- Returns its record, or nil.
return record(epoch_name(ARGV[1], redis.call('HGET', P .. 'epoch_numbers', ARGV[1]) or '0'))
