-- Take back expired leases, end delays, sweep forgotten units.
-- Keys: leader (read), leases, leased:*, delayed, unit:*, ready:*, quarantined:*, job:*, runnable, turn,
--   trash, wake (written).
-- ARGV: generation, nonce, max attempts, most units to handle, most forgotten units to sweep.
-- Returns {"deposed"}, or {"ok", "job/unit"…} of the units made ready.
if deposed(ARGV[1], ARGV[2]) then
  return { 'deposed' }
end
local answer = { 'ok' }
local function now_ready(job, unit)
  append_ready(job, unit)
  refresh(job)
  answer[#answer + 1] = job .. '/' .. unit
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', P .. 'leases', '-inf', int(now_ms), 'LIMIT', 0, ARGV[4])) do
  local job, unit = string.match(member, '^(.*)/([^/]*)$')
  local record = unit_key(job, unit)
  drop_lease(job, unit)
  redis.call('HSET', record, 'expired_at', int(now_ms)) -- not its end: a clock that jumped ends leases early
  redis.call('HINCRBY', record, 'expired', 1)
  redis.call('HINCRBY', record, 'failures', 1)
  if worn_out(job, unit, tonumber(ARGV[3])) then
    quarantine(job, unit, '')
    refresh(job)
  else
    redis.call('HINCRBY', job_key(job), 'units_ready', 1)
    now_ready(job, unit)
    announce_if_idle(job)
  end
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', P .. 'delayed', '-inf', int(now_ms), 'LIMIT', 0, ARGV[4])) do
  local job, unit = string.match(member, '^(.*)/([^/]*)$')
  redis.call('ZREM', P .. 'delayed', member)
  if live(job, unit) then
    now_ready(job, unit)
  end
end
local heap = redis.call('LINDEX', P .. 'trash', 0)
if heap then
  local incarnation, first, last, job = string.match(heap, '^(%d+):(%d+):(%d+):(.*)$')
  local stop = math.min(tonumber(last), tonumber(first) + tonumber(ARGV[5]) - 1)
  local keys = {}
  for number = tonumber(first), stop do
    keys[#keys + 1] = unit_key(job, incarnation .. '-' .. int(number))
  end
  redis.call('UNLINK', unpack(keys))
  if stop == tonumber(last) then
    redis.call('LPOP', P .. 'trash')
  else
    redis.call('LSET', P .. 'trash', 0, incarnation .. ':' .. int(stop + 1) .. ':' .. last .. ':' .. job)
  end
end
return answer
