-- One epoch.
-- Keys: epoch:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*, epoch_readable:* (read).
-- ARGV: group, number.
-- Returns its record, or nil.
return record(epoch_name(ARGV[1], ARGV[2]))
