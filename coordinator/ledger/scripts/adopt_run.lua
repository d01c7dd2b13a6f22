-- Record the server's run, make every leased unit ready and suspect, and hold claims back for a while.
-- Keys: leader (read), run, hold, leases, leased:*, unit:*, job:*, ready:*, runnable, turn (written).
-- ARGV: generation, nonce, hold in ms.
-- Returns -1 if deposed, else the number of units made ready.
if not leads(ARGV[1], ARGV[2]) then
  return -1
end
local run = server_run()
-- A ledger without any record of a run grants no leases: it is new, or its last leader resigned when there was none.
local hold = redis.call('EXISTS', P .. 'run') == 1 and tonumber(ARGV[3]) or 0
-- A renewal may be among the writes that were lost, so a holder may live as long as claims are held back.
local over = int(now_ms + hold)
local members = redis.call('ZRANGE', P .. 'leases', 0, -1)
for _, member in ipairs(members) do
  local job, unit = string.match(member, '^(.*)/([^/]*)$')
  drop_lease(job, unit)
  redis.call('HSET', unit_key(job, unit), 'expired_at', over)
  redis.call('HINCRBY', unit_key(job, unit), 'expired', 1)
  redis.call('HINCRBY', job_key(job), 'units_ready', 1)
  append_ready(job, unit)
  refresh(job)
end
redis.call('SET', P .. 'run', run)
redis.call('SET', P .. 'hold', over)
return #members
