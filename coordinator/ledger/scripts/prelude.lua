-- Put before every script of this directory by connection.py; does nothing by itself.
-- KEYS[1] is the prefix of all keys (see keys.py, which says what each key is). Keys are composed here,
-- which a cluster would not allow: the ledger lives on one server.
local P = KEYS[1]
local time = redis.call('TIME')
local now_us = time[1] * 1000000 + time[2]
local now_ms = math.floor(now_us / 1000)
local now_s = time[1] .. '.' .. string.format('%06d', tonumber(time[2]))

-- Lua prints large numbers as 1.2e+15: every number on its way into Redis passes through here.
local function int(number)
  return string.format('%.0f', number)
end

local function add(key, field, number)
  if number ~= 0 then
    redis.call('HINCRBY', key, field, int(number))
  end
end

-- How fast a job goes (coordinator/model/progress.py): from this moment on, whatever it did before.
local function restart_rate(record)
  local offset = redis.call('HGET', record, 'offset')
  redis.call('HSET', record, 'progress_at', now_s, 'rate_from_at', now_s, 'rate_from_offset', offset,
    'rate_mark_at', now_s, 'rate_mark_offset', offset)
end

local RATE_WINDOW_S = 5 -- also in progress.py

-- Bytes of a job are done. What is to be done again is taken from `offset` without a word to the rate.
local function advance(record, bytes)
  if bytes == 0 then
    return
  end
  local offset, now = int(redis.call('HINCRBY', record, 'offset', int(bytes))), now_us / 1000000
  local f = redis.call('HMGET', record, 'progress_at', 'rate_mark_at', 'rate_mark_offset')
  redis.call('HINCRBYFLOAT', record, 'active_s', string.format('%.6f', math.max(0, now - tonumber(f[1]))))
  redis.call('HSET', record, 'progress_at', now_s)
  if now - tonumber(f[2]) >= RATE_WINDOW_S then
    redis.call('HSET', record, 'rate_from_at', f[2], 'rate_from_offset', f[3],
      'rate_mark_at', now_s, 'rate_mark_offset', offset)
  end
end

local function job_key(job) return P .. 'job:' .. job end
local function unit_key(job, unit) return P .. 'unit:' .. job .. '/' .. unit end
local function ready_key(job) return P .. 'ready:' .. job end

-- Leadership: true when (generation, nonce) is not the current term.
local function leads(generation, nonce)
  local leader = redis.call('HMGET', P .. 'leader', 'generation', 'nonce')
  return leader[1] == generation and leader[2] == nonce
end

local function server_run()
  return string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
end

-- A leader that read before the server was restarted may decide by what the server has lost, and its term may be all
-- that is left: until it, or another, has adopted the new run, it decides nothing.
local function deposed(generation, nonce)
  local run = redis.call('GET', P .. 'run')
  return not leads(generation, nonce) or (run and run ~= server_run())
end

local RUNS = { running = true, ready = true, waiting = true }

-- True where units of the job may be worked on.
local function may_run(job)
  local f = redis.call('HMGET', job_key(job), 'state', 'pause_requested', 'cancel_requested', 'fatal', 'closing')
  if f[1] == 'aborting' and f[5] == '1' then
    return true
  end
  return RUNS[f[1]] ~= nil and f[2] ~= '1' and f[3] == '' and f[4] ~= '1'
end

-- The control loop looks at the job again; many wakes before it does are one.
local function wake(job)
  redis.call('ZADD', P .. 'wake', 'NX', int(now_us), job)
end

-- A change the control loop must not decide without having seen.
local function announce(job)
  redis.call('HINCRBY', job_key(job), 'version', 1)
  wake(job)
end

-- After a lease of a job ended: the control loop waits for this when nothing is left to do, and when nobody
-- may go on (it pauses and concludes a job only once no unit is leased).
local function announce_if_idle(job)
  local f = redis.call('HMGET', job_key(job), 'units_ready', 'units_leased')
  if f[2] == '0' and (f[1] == '0' or not may_run(job)) then
    announce(job)
  end
end

local function emit(job, name, data)
  redis.call('XADD', P .. 'events', 'MAXLEN', '~', 100000, '*',
    'event', name, 'job', job, 'time', now_s, 'data', data)
end

-- Events as pairs of name and JSON from ARGV[first] on.
local function emit_all(job, first)
  for i = first, #ARGV, 2 do
    emit(job, ARGV[i], ARGV[i + 1])
  end
end

-- Put the job among the runnable ones, or take it away: after every change of what decides that.
local function refresh(job)
  local f = redis.call('HMGET', job_key(job), 'max_writers', 'units_leased')
  local writers = tonumber(f[1] or 0)
  if may_run(job) and (writers == 0 or tonumber(f[2]) < writers)
      and redis.call('EXISTS', ready_key(job)) == 1 then
    if not redis.call('ZSCORE', P .. 'runnable', job) then
      redis.call('ZADD', P .. 'runnable', redis.call('INCR', P .. 'turn'), job)
    end
  else
    redis.call('ZREM', P .. 'runnable', job)
  end
end

-- True while nothing may be claimed: the server restarted and was not adopted, or is held after it was.
local function held_back()
  local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
  if redis.call('GET', P .. 'run') ~= run then
    return true
  end
  local hold = redis.call('GET', P .. 'hold')
  return hold and tonumber(hold) > now_ms
end

local function holds(job, unit, token)
  local f = redis.call('HMGET', unit_key(job, unit), 'state', 'token')
  return f[1] == 'leased' and f[2] == token
end

-- False for units that drop_units forgot and that are still being swept.
local function live(job, unit)
  return redis.call('HGET', job_key(job), '_incarnation') == string.match(unit, '^%d+')
end

local function append_ready(job, unit)
  redis.call('HSET', unit_key(job, unit), 'state', 'ready')
  redis.call('RPUSH', ready_key(job), unit)
end

-- A new unit at the end of the job's ready list. The caller refreshes the job.
local function create_unit(job, kind, pass, first, last, bytes, extents)
  local number = redis.call('HINCRBY', job_key(job), '_next_unit', 1)
  local unit = redis.call('HGET', job_key(job), '_incarnation') .. '-' .. number
  redis.call('HSET', unit_key(job, unit), 'kind', kind, 'pass', pass, 'start', first, 'end', last,
    'bytes', bytes, 'counted', 0, 'extents', extents, 'failures', 0, 'expired', 0, 'rewrite', 0)
  append_ready(job, unit)
  redis.call('HINCRBY', job_key(job), 'units_ready', 1)
end

-- What a copy unit's holder says is flushed may yet turn out to be lost, for as long as a lease lasts that began
-- before: its flush may have been the one that was told, see lose_flush.
local function remember_flushed(job, unit)
  redis.call('ZADD', P .. 'recent:' .. job, redis.call('HGET', job_key(job), '_claims'), unit)
end

local function forget_flushed(job)
  local oldest = redis.call('ZRANGE', P .. 'leased:' .. job, 0, 0, 'WITHSCORES')[2]
  local over = oldest and '(' .. oldest or '+inf'
  for _, unit in ipairs(redis.call('ZRANGEBYSCORE', P .. 'recent:' .. job, '-inf', over)) do
    local f = redis.call('HMGET', unit_key(job, unit), 'state', 'expired')
    if f[1] == 'done' and f[2] == '0' then
      redis.call('UNLINK', unit_key(job, unit))
    end
  end
  redis.call('ZREMRANGEBYSCORE', P .. 'recent:' .. job, '-inf', over)
end

-- The lease ends. The caller puts the unit where it belongs now.
local function drop_lease(job, unit)
  redis.call('ZREM', P .. 'leases', job .. '/' .. unit)
  redis.call('ZREM', P .. 'leased:' .. job, unit)
  redis.call('HDEL', unit_key(job, unit), 'token', 'until', 'worker', 'spoilt')
  redis.call('HINCRBY', job_key(job), 'units_leased', -1)
  forget_flushed(job)
end

-- All of a unit is to be done again: what was counted of it leaves the job's offset.
local function undo(job, unit)
  local record = unit_key(job, unit)
  add(job_key(job), 'offset', -tonumber(redis.call('HGET', record, 'counted')))
  redis.call('HSET', record, 'counted', 0)
  redis.call('HDEL', record, 'remaining', 'digest')
end

-- A flush of a copy unit failed, whose lease is about to end. Kernel and server tell of lost writes once, to one of
-- those who flush: the flushes of the others succeed without their bytes. Only units whose leases overlap this one can
-- be among them, and all of these are written anew.
local function lose_flush(job, told)
  redis.call('HSET', unit_key(job, told), 'rewrite', 1)
  for _, unit in ipairs(redis.call('ZRANGEBYSCORE', P .. 'leased:' .. job, '-inf', '(+inf')) do
    if unit ~= told then
      undo(job, unit)
      redis.call('HSET', unit_key(job, unit), 'rewrite', 1, 'spoilt', 1)
    end
  end
  local since = redis.call('ZSCORE', P .. 'leased:' .. job, told)
  for _, unit in ipairs(redis.call('ZRANGEBYSCORE', P .. 'recent:' .. job, since, '+inf')) do
    local state = redis.call('HGET', unit_key(job, unit), 'state')
    if state ~= 'leased' then
      undo(job, unit)
      redis.call('HSET', unit_key(job, unit), 'rewrite', 1)
      if state == 'done' then
        redis.call('SREM', P .. 'suspects:' .. job, unit)
        redis.call('HINCRBY', job_key(job), 'units_done', -1)
        redis.call('HINCRBY', job_key(job), 'units_ready', 1)
        append_ready(job, unit)
      end
    end
  end
end

-- `cause`: JSON of the last event that its holder gave it back with, "" if it ended without a word.
local function quarantine(job, unit, cause)
  redis.call('HSET', unit_key(job, unit), 'state', 'quarantined', 'cause', cause)
  redis.call('SADD', P .. 'quarantined:' .. job, unit)
  redis.call('HINCRBY', job_key(job), 'units_quarantined', 1)
  announce(job)
end

-- Given-up units are ready again, in the order in which they were made; their attempts are counted from the start.
local function retry_quarantined(job)
  local units = redis.call('SMEMBERS', P .. 'quarantined:' .. job)
  table.sort(units, function(one, other)
    return tonumber(string.match(one, '%d+$')) < tonumber(string.match(other, '%d+$'))
  end)
  for _, unit in ipairs(units) do
    redis.call('HSET', unit_key(job, unit), 'failures', 0)
    append_ready(job, unit)
  end
  redis.call('UNLINK', P .. 'quarantined:' .. job)
  add(job_key(job), 'units_ready', #units)
  add(job_key(job), 'units_quarantined', -#units)
end

-- Whether the counted attempts of a unit have reached a bound; 0 is no bound.
local function worn_out(job, unit, max_attempts)
  return max_attempts > 0
    and tonumber(redis.call('HGET', unit_key(job, unit), 'failures')) >= max_attempts
end

-- The unit is done, its lease over: count it once, remember the token, keep the record of a suspect for settle,
-- and of any copy unit for as long as it may be lost.
local function complete_unit(job, unit, token, digest)
  local key, record = unit_key(job, unit), job_key(job)
  local f = redis.call('HMGET', key, 'bytes', 'counted', 'expired', 'kind')
  advance(record, tonumber(f[1]) - tonumber(f[2]))
  redis.call('HINCRBY', record, 'units_done', 1)
  redis.call('SET', P .. 'done:' .. token, job .. '/' .. unit, 'EX', 3600)
  if tonumber(f[1]) > 0 then
    redis.call('HSET', key, 'state', 'done', 'counted', f[1], 'digest', digest)
    if tonumber(f[3]) > 0 then
      redis.call('SADD', P .. 'suspects:' .. job, unit)
    end
    remember_flushed(job, unit)
    drop_lease(job, unit)
  else
    drop_lease(job, unit)
    redis.call('UNLINK', key)
  end
  return f[4]
end

-- Forget all units of a job: what is small at once, the rest is swept in batches by reap.
local function forget_units(job)
  local record = job_key(job)
  for _, unit in ipairs(redis.call('ZRANGE', P .. 'leased:' .. job, 0, -1)) do
    redis.call('ZREM', P .. 'leases', job .. '/' .. unit)
    redis.call('UNLINK', unit_key(job, unit))
  end
  redis.call('UNLINK', ready_key(job), P .. 'leased:' .. job, P .. 'recent:' .. job,
    P .. 'suspects:' .. job, P .. 'quarantined:' .. job, P .. 'results:' .. job)
  local f = redis.call('HMGET', record, '_incarnation', '_next_unit')
  if f[2] ~= '0' then
    redis.call('RPUSH', P .. 'trash', f[1] .. ':1:' .. f[2] .. ':' .. job)
  end
  redis.call('HSET', record, '_incarnation', redis.call('INCR', P .. 'incarnations'), '_next_unit', 0,
    '_claims', 0, 'units_ready', 0, 'units_leased', 0, 'units_done', 0, 'units_quarantined', 0)
end

-- A number that grows with every call. By the clock, so that it goes on growing when the server has lost its memory.
local function new_mark()
  local mark = int(math.max(now_us, tonumber(redis.call('GET', P .. 'mark') or 0) + 1))
  redis.call('SET', P .. 'mark', mark)
  return mark
end

local FORGOTTEN = 10000 -- also in redis_points.py

local function forget_point(repository, group, epoch)
  local name = group .. '@' .. epoch
  redis.call('HDEL', P .. 'points:' .. repository, name)
  redis.call('ZREM', P .. 'recorded:' .. repository, name)
  redis.call('SREM', P .. 'told:' .. repository, name)
  redis.call('ZREM', P .. 'epochs:' .. repository .. ':' .. group, epoch)
  redis.call('ZADD', P .. 'forgotten:' .. repository, new_mark(), name)
  redis.call('ZREMRANGEBYRANK', P .. 'forgotten:' .. repository, 0, -FORGOTTEN - 1)
end

local function forget_group_if_empty(repository, group)
  if redis.call('EXISTS', P .. 'epochs:' .. repository .. ':' .. group) == 0 then
    redis.call('SREM', P .. 'groups:' .. repository, group)
  end
end
