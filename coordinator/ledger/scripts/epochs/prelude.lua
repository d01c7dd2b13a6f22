-- Put after ../prelude.lua and before every script of this directory. What is decided here is decided in
-- coordinator/model/epoch.py, in the same words.
local EPOCH_KEPT_MS = 3600000 -- also in redis_epochs.py
local NEWS = 1000 -- also in redis_epochs.py

local function epoch_name(group, number) return group .. '@' .. number end
local function epoch_key(epoch) return P .. 'epoch:' .. epoch end
local function vms_key(epoch) return P .. 'epoch_vms:' .. epoch end
local function arrived_key(epoch, arrival) return P .. 'epoch_' .. arrival .. ':' .. epoch end

-- Phase, go key, why, and the ms left of this phase: what participants act on.
local function standing(epoch)
  local f = redis.call('HMGET', epoch_key(epoch), 'phase', 'key', 'why', 'prepare_by_ms', 'freeze_by_ms',
    'hold_by_ms')
  local ENDS = { preparing = f[4], freezing = f[5], cutting = f[6], taken = f[6] }
  return { f[1], f[2], f[3], math.max(0, tonumber(ENDS[f[1]] or now_ms) - now_ms) }
end

-- All of an epoch, for epoch_of in redis_epochs.py; nil if there is none.
local function record(epoch)
  local fields = redis.call('HGETALL', epoch_key(epoch))
  if #fields == 0 then
    return nil
  end
  return { fields, redis.call('SMEMBERS', arrived_key(epoch, 'prepared')),
    redis.call('SMEMBERS', arrived_key(epoch, 'frozen')), redis.call('HGETALL', arrived_key(epoch, 'cut')),
    redis.call('HGETALL', arrived_key(epoch, 'readable')) }
end

-- Every host of the epoch hears how it stands now; the leader where it has to act.
local function tell(epoch)
  local f = redis.call('HMGET', epoch_key(epoch), 'group', 'number', '_hosts')
  local s = standing(epoch)
  for host in string.gmatch(f[3], '[^\n]+') do
    local news = P .. 'epoch_news:' .. host
    redis.call('XADD', news, 'MAXLEN', '~', NEWS, '*',
      'group', f[1], 'number', f[2], 'phase', s[1], 'key', s[2], 'why', s[3], 'left_ms', int(s[4]))
    redis.call('PEXPIRE', news, EPOCH_KEPT_MS)
  end
  if s[1] == 'taken' or s[1] == 'readable' or s[1] == 'aborted' then
    wake('group:' .. f[1])
  end
end

-- `...`: further fields and their values.
local function move(epoch, phase, ...)
  redis.call('HSET', epoch_key(epoch), 'phase', phase, ...)
  tell(epoch)
end

-- Nothing is added to an epoch that is over: its records may go, but not before late participants have asked.
local function finish_epoch(epoch, phase, ...)
  move(epoch, phase, 'over_ms', int(now_ms), ...)
  redis.call('SREM', P .. 'epochs_open', epoch)
  for host in string.gmatch(redis.call('HGET', epoch_key(epoch), '_hosts'), '[^\n]+') do
    redis.call('SREM', P .. 'epochs_on:' .. host, epoch)
  end
  for _, key in ipairs({ epoch_key(epoch), vms_key(epoch), arrived_key(epoch, 'prepared'),
      arrived_key(epoch, 'frozen'), arrived_key(epoch, 'cut'), arrived_key(epoch, 'readable') }) do
    redis.call('PEXPIRE', key, EPOCH_KEPT_MS)
  end
end

-- GO is never taken back, whatever becomes of the epoch.
local function abort_epoch(epoch, why)
  local f = redis.call('HMGET', epoch_key(epoch), 'key', '_run')
  finish_epoch(epoch, 'aborted', 'key', f[1] == 'open' and 'abort' or f[1], 'why', why,
    'doubtful', f[2] == server_run() and 0 or 1)
end

-- Of these the arrivals are kept with their facts, in a hash; of others in a set.
local HAS_FACTS = { cut = true, readable = true }

local function has_arrived(epoch, arrival, vm)
  return redis.call(HAS_FACTS[arrival] and 'HEXISTS' or 'SISMEMBER', arrived_key(epoch, arrival), vm) == 1
end

-- Abort if the time of this phase is over: the only place where a clock decides anything.
local function time_out(epoch)
  local f = redis.call('HMGET', epoch_key(epoch), 'phase', 'prepare_by_ms', 'freeze_by_ms', 'hold_by_ms')
  local AWAITED = { preparing = 'prepared', freezing = 'frozen', cutting = 'cut', taken = 'readable' }
  local ENDS = { preparing = f[2], freezing = f[3], cutting = f[4], taken = f[4] }
  local arrival = AWAITED[f[1]]
  if not arrival or now_ms < tonumber(ENDS[f[1]]) then
    return
  end
  local missing = {}
  for _, vm in ipairs(redis.call('ZRANGE', vms_key(epoch), 0, -1)) do
    if not has_arrived(epoch, arrival, vm) then
      missing[#missing + 1] = vm
    end
  end
  abort_epoch(epoch, 'not ' .. arrival .. ' in time: ' .. table.concat(missing, ', '))
end
