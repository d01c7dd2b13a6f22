-- A participant cannot go on: abort, unless the go key says GO.
-- Keys: epoch:*, epoch_vms:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*, epoch_readable:*, epoch_news:*,
--   epochs_on:*, epochs_open, wake (written).
-- ARGV: group, number, why.
-- Returns how the epoch stands, or {"missing"}.
local epoch = epoch_name(ARGV[1], ARGV[2])
local key = redis.call('HGET', epoch_key(epoch), 'key')
if not key then
  return { 'missing' }
end
if key == 'open' then
  abort_epoch(epoch, ARGV[3])
end
return standing(epoch)
