-- Settle found suspect units changed: they are copied again, and the settle unit is done.
-- Keys: unit:*, suspects:*, quarantined:*, done:*, leases, leased:*, ready:*, job:*, runnable, turn, wake (written).
-- ARGV: job, unit, token, max attempts, then the suspect units.
-- Returns 1, or 0 if stale.
local job, unit, key = ARGV[1], ARGV[2], job_key(ARGV[1])
if not holds(job, unit, ARGV[3]) or redis.call('HGET', unit_key(job, unit), 'kind') ~= 'settle' then
  return 0
end
for i = 5, #ARGV do
  local suspect = ARGV[i]
  if redis.call('SREM', P .. 'suspects:' .. job, suspect) == 1 then
    undo(job, suspect)
    redis.call('HINCRBY', key, 'units_done', -1)
    redis.call('HINCRBY', unit_key(job, suspect), 'failures', 1)
    if worn_out(job, suspect, tonumber(ARGV[4])) then
      quarantine(job, suspect, '')
    else
      redis.call('HINCRBY', key, 'units_ready', 1)
      append_ready(job, suspect)
    end
  end
end
complete_unit(job, unit, ARGV[3], '')
announce(job)
refresh(job)
return 1
