-- Where the quarantined units of a job lie.
-- Keys: quarantined:*, unit:* (read).
-- ARGV: job.
-- Returns {start, end} of each.
local answer = {}
for _, unit in ipairs(redis.call('SMEMBERS', P .. 'quarantined:' .. ARGV[1])) do
  answer[#answer + 1] = redis.call('HMGET', unit_key(ARGV[1], unit), 'start', 'end')
end
return answer
