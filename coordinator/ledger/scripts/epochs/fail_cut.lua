-- After GO: a participant's cut failed, or its view broke before all could be read.
-- Keys: epoch:*, epoch_vms:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*, epoch_readable:*, epoch_news:*,
--   epochs_on:*, epochs_open, wake (written).
-- ARGV: group, number, why.
-- Returns how the epoch stands, {"early", phase} before GO, {"late", phase} once all can be read, or {"missing"}.
local epoch = epoch_name(ARGV[1], ARGV[2])
local phase = redis.call('HGET', epoch_key(epoch), 'phase')
if not phase then
  return { 'missing' }
end
if phase == 'preparing' or phase == 'freezing' then
  return { 'early', phase }
end
if phase == 'readable' or phase == 'retired' then
  return { 'late', phase }
end
if phase ~= 'aborted' then
  abort_epoch(epoch, ARGV[3])
end
return standing(epoch)
