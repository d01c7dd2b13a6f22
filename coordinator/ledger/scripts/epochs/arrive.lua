-- A participant has prepared, frozen, cut, or is readable; or somebody has waited long enough, it thinks.
-- Keys: epoch:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*, epoch_readable:*, epoch_news:*, epochs_on:*, epochs_open,
--   wake (written), epoch_vms:* (read).
-- ARGV: group, number, then of an arrival: "prepared", "frozen", "cut" or "readable", the machine, and of the last two
--   its facts as JSON.
-- Returns how the epoch stands, {"early", phase} for what nobody was told to do, or {"missing"}.
local epoch, arrival, vm = epoch_name(ARGV[1], ARGV[2]), ARGV[3], ARGV[4]
if redis.call('EXISTS', epoch_key(epoch)) == 0 then
  return { 'missing' }
end
if arrival and has_arrived(epoch, arrival, vm) then
  return standing(epoch)
end
time_out(epoch)
local phase = redis.call('HGET', epoch_key(epoch), 'phase')
if not arrival or phase == 'aborted' then
  return standing(epoch)
end
-- In a later phase all have arrived, so this is an earlier one.
local COUNTS_IN = { prepared = 'preparing', frozen = 'freezing', cut = 'cutting', readable = 'taken' }
if phase ~= COUNTS_IN[arrival] then
  return { 'early', phase }
end
local function spec() return cjson.decode(redis.call('HGET', epoch_key(epoch), 'spec')) end
local arrived, all = arrived_key(epoch, arrival), redis.call('ZCARD', vms_key(epoch))
if HAS_FACTS[arrival] then
  redis.call('HSET', arrived, vm, ARGV[5])
  if redis.call('HLEN', arrived) == all then
    move(epoch, arrival == 'cut' and 'taken' or 'readable')
  end
else
  redis.call('SADD', arrived, vm)
  if redis.call('SCARD', arrived) == all then
    if arrival == 'prepared' then
      move(epoch, 'freezing', 'freeze_by_ms', int(now_ms + spec().freeze_ms))
    else
      move(epoch, 'cutting', 'key', 'go', 'go_ms', int(now_ms), 'hold_by_ms', int(now_ms + spec().hold_ms))
    end
  end
end
return standing(epoch)
