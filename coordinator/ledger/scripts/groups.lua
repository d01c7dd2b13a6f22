-- All groups.
-- Keys: group_names, group:* (read).
-- Returns name, version and record of each.
local records = {}
for _, name in ipairs(redis.call('SMEMBERS', P .. 'group_names')) do
  local f = redis.call('HMGET', P .. 'group:' .. name, 'version', 'record')
  if f[1] and f[2] then
    records[#records + 1] = { name, f[1], f[2] }
  end
end
return records
