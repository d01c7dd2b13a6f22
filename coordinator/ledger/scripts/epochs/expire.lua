-- Abort epochs whose phase has timed out, whether or not anybody of them still waits.
-- Keys: leader (read), epochs_open, epoch:*, epoch_vms:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*,
--   epoch_readable:*, epoch_news:*, epochs_on:*, wake (written).
-- ARGV: generation, nonce.
-- Returns {"deposed"}, or {"ok", epoch, why, …} of those that it aborted.
if deposed(ARGV[1], ARGV[2]) then
  return { 'deposed' }
end
local answer = { 'ok' }
for _, epoch in ipairs(redis.call('SMEMBERS', P .. 'epochs_open')) do
  time_out(epoch)
  local f = redis.call('HMGET', epoch_key(epoch), 'phase', 'why')
  if f[1] == 'aborted' then
    answer[#answer + 1] = epoch
    answer[#answer + 1] = f[2]
  end
end
return answer
