-- Participants have prepared, frozen, cut, or are readable; or somebody has waited long enough, it thinks.
-- Keys: epoch:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*, epoch_readable:*, epoch_news:*, epochs_on:*, epochs_open,
--   wake (written), epoch_vms:* (read).
-- ARGV: group, number, then of an arrival: "prepared", "frozen", "cut" or "readable", of the last two the facts as JSON
--   (else ""), and the machines: one, where there are facts.
-- Returns how the epoch stands, {"early", phase} for what nobody was told to do, or {"missing"}.
local epoch, arrival, facts, vms = epoch_name(ARGV[1], ARGV[2]), ARGV[3], ARGV[4], { unpack(ARGV, 5) }
if redis.call('EXISTS', epoch_key(epoch)) == 0 then
  return { 'missing' }
end
local missing = {}
for _, vm in ipairs(vms) do
  if not has_arrived(epoch, arrival, vm) then
    missing[#missing + 1] = vm
  end
end
if arrival and #missing == 0 then
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
  redis.call('HSET', arrived, missing[1], facts)
  if redis.call('HLEN', arrived) == all then
    move(epoch, arrival == 'cut' and 'taken' or 'readable')
  end
else
  redis.call('SADD', arrived, unpack(missing))
  if redis.call('SCARD', arrived) == all then
    if arrival == 'prepared' then
      move(epoch, 'freezing', 'freeze_by_ms', int(now_ms + spec().freeze_ms))
    else
      move(epoch, 'cutting', 'key', 'go', 'go_ms', int(now_ms), 'hold_by_ms', int(now_ms + spec().hold_ms))
    end
  end
end
return standing(epoch)
