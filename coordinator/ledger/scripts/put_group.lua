-- Record a group, if nobody has changed it since it was read.
-- Keys: leader (read), group:*, group_names, events, wake (written).
-- ARGV: name, the version it was read in, the record as JSON, generation or "", nonce, then events as pairs.
-- Returns "ok", "deposed" or "conflict".
local key = P .. 'group:' .. ARGV[1]
if ARGV[4] ~= '' and deposed(ARGV[4], ARGV[5]) then return 'deposed' end
if (redis.call('HGET', key, 'version') or '0') ~= ARGV[2] then return 'conflict' end
redis.call('HSET', key, 'version', int(tonumber(ARGV[2]) + 1), 'record', ARGV[3])
redis.call('SADD', P .. 'group_names', ARGV[1])
emit_all('', 6)
wake('group:' .. ARGV[1])
return 'ok'
