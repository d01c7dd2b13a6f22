-- Open a group's next epoch.
-- Keys: leader, run (read), epoch_numbers (hash), epoch:*, epoch_vms:*, epochs_open, epochs_on:*,
--   epoch_news:* (written).
-- ARGV: generation, nonce, group, the greatest number used elsewhere, prepare in ms, the spec as JSON,
--   its hosts (one a line), then its machines.
-- Returns {"ok", record}, {"deposed"}, {"restarted"}, or {"open", number, phase} of the one that is not over.
local group, numbers = ARGV[3], P .. 'epoch_numbers'
if deposed(ARGV[1], ARGV[2]) then
  return { 'deposed' }
end
if redis.call('EXISTS', P .. 'run') == 0 then
  return { 'restarted' }
end
local last = redis.call('HGET', numbers, group) or '0'
local phase = redis.call('HGET', epoch_key(epoch_name(group, last)), 'phase')
if phase and phase ~= 'retired' and phase ~= 'aborted' then
  return { 'open', last, phase }
end
local number = int(math.max(tonumber(last), tonumber(ARGV[4])) + 1)
local epoch = epoch_name(group, number)
redis.call('HSET', numbers, group, number)
redis.call('HSET', epoch_key(epoch), 'group', group, 'number', number, 'spec', ARGV[6], 'key', 'open', 'why', '',
  'opened_ms', int(now_ms), 'prepare_by_ms', int(now_ms + tonumber(ARGV[5])), 'freeze_by_ms', 0, 'go_ms', 0,
  'hold_by_ms', 0, 'over_ms', 0, '_hosts', ARGV[7], '_run', server_run())
for i = 8, #ARGV do
  redis.call('ZADD', vms_key(epoch), i, ARGV[i])
end
redis.call('SADD', P .. 'epochs_open', epoch)
for host in string.gmatch(ARGV[7], '[^\n]+') do
  redis.call('SADD', P .. 'epochs_on:' .. host, epoch)
end
move(epoch, 'preparing')
return { 'ok', record(epoch) }
