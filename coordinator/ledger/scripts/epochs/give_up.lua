-- The coordinator ends an epoch without result.
-- Keys: leader (read), epoch:*, epoch_vms:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*, epoch_readable:*,
--   epoch_news:*, epochs_on:*, epochs_open, wake (written).
-- ARGV: generation, nonce, group, number, why.
-- Returns {"ok", record}, {"deposed"} or {"missing"}.
local epoch = epoch_name(ARGV[3], ARGV[4])
if deposed(ARGV[1], ARGV[2]) then
  return { 'deposed' }
end
local phase = redis.call('HGET', epoch_key(epoch), 'phase')
if not phase then
  return { 'missing' }
end
if phase ~= 'aborted' and phase ~= 'retired' then
  abort_epoch(epoch, ARGV[5])
end
return { 'ok', record(epoch) }
