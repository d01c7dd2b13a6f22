-- The epochs that a host takes part in and that are not over.
-- Keys: epochs_on:*, epoch:*, epoch_prepared:*, epoch_frozen:*, epoch_cut:*, epoch_readable:* (read).
-- ARGV: host.
-- Returns the record of each.
local answer = {}
for _, epoch in ipairs(redis.call('SMEMBERS', P .. 'epochs_on:' .. ARGV[1])) do
  answer[#answer + 1] = record(epoch)
end
return answer
