-- The coordinator has published an epoch.
-- Keys: leader (read), epoch:*, epoch_vms:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*, epoch_readable:*,
--   epoch_news:*, epochs_on:*, epochs_open (written).
-- ARGV: generation, nonce, group, number.
-- Returns {"ok", record}, {"deposed"}, {"missing"}, or {"refused", phase} of one that cannot be read.
local epoch = epoch_name(ARGV[3], ARGV[4])
if deposed(ARGV[1], ARGV[2]) then
  return { 'deposed' }
end
local phase = redis.call('HGET', epoch_key(epoch), 'phase')
if not phase then
  return { 'missing' }
end
if phase == 'readable' then
  finish_epoch(epoch, 'retired')
elseif phase ~= 'retired' then
  return { 'refused', phase }
end
return { 'ok', record(epoch) }
