-- A participant has prepared, frozen or cut; or somebody has waited long enough, it thinks.
-- Keys: epoch:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*, epoch_news:*, epochs_on:*, wake (written),
--   epoch_vms:* (read).
-- ARGV: group, number, then of an arrival: "prepared", "frozen" or "cut", the machine, and of a cut its facts as JSON.
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
local COUNTS_IN = { prepared = 'preparing', frozen = 'freezing', cut = 'cutting' }
if phase ~= COUNTS_IN[arrival] then
  return { 'early', phase }
end
local arrived, all = arrived_key(epoch, arrival), redis.call('ZCARD', vms_key(epoch))
if arrival == 'cut' then
  redis.call('HSET', arrived, vm, ARGV[5])
  if redis.call('HLEN', arrived) == all then
    move(epoch, 'taken')
  end
else
  redis.call('SADD', arrived, vm)
  if redis.call('SCARD', arrived) == all then
    if arrival == 'prepared' then
      local freeze = cjson.decode(redis.call('HGET', epoch_key(epoch), 'spec')).freeze_ms
      move(epoch, 'freezing', 'freeze_by_ms', int(now_ms + freeze))
    else
      move(epoch, 'cutting', 'key', 'go', 'go_ms', int(now_ms))
    end
  end
end
return standing(epoch)
