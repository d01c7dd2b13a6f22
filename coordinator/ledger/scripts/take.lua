-- Take bytes out of a job's token bucket; it may go into debt, which the wait pays for.
-- Keys: bucket:* (hash: level in bytes, at in µs, speed in bytes/s; written).
-- ARGV: job, bytes wanted, speed in bytes/s (> 0), burst in bytes.
-- Returns the ms to wait.
local key, speed, burst = P .. 'bucket:' .. ARGV[1], tonumber(ARGV[3]), tonumber(ARGV[4])
local f = redis.call('HMGET', key, 'level', 'at', 'speed')
local level = burst
if f[1] then
  -- Until now the bucket filled at the speed it had.
  level = math.min(burst, tonumber(f[1]) + math.max(0, now_us - tonumber(f[2])) * tonumber(f[3]) / 1000000)
end
level = level - tonumber(ARGV[2])
local wait = level < 0 and math.ceil(-level * 1000 / speed) or 0
redis.call('HSET', key, 'level', string.format('%.17g', level), 'at', int(now_us), 'speed', int(speed))
redis.call('PEXPIRE', key, int(wait + 3600000))
return wait
