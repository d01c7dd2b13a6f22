-- Forget a group, if nobody has changed it since it was read.
-- Keys: group:*, group_names, wake (written).
-- ARGV: name, version.
-- Returns "ok", "missing" or "conflict".
local key = P .. 'group:' .. ARGV[1]
local version = redis.call('HGET', key, 'version')
if not version then return 'missing' end
if version ~= ARGV[2] then return 'conflict' end
redis.call('UNLINK', key)
redis.call('SREM', P .. 'group_names', ARGV[1])
redis.call('ZREM', P .. 'wake', 'group:' .. ARGV[1])
return 'ok'
