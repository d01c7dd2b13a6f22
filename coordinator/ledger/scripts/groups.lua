-- All groups.
-- Keys: group_names, group:* (read).
-- Returns their records.
local records = {}
for _, name in ipairs(redis.call('SMEMBERS', P .. 'group_names')) do
  records[#records + 1] = redis.call('HGET', P .. 'group:' .. name, 'record')
end
return records
