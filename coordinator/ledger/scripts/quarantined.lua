-- The units of a job that were given up.
-- Keys: quarantined:*, unit:* (read).
-- ARGV: job.
-- Returns {start, end, kind, failures, cause} of each.
local answer = {}
for _, unit in ipairs(redis.call('SMEMBERS', P .. 'quarantined:' .. ARGV[1])) do
  answer[#answer + 1] = redis.call('HMGET', unit_key(ARGV[1], unit), 'start', 'end', 'kind', 'failures', 'cause')
end
return answer
