-- Remember recovery points, and by which URI their repository is named.
-- Keys: repositories, groups:*, points:*, epochs:*, recorded:*, forgotten:*, told:*, mark, events (written).
-- ARGV: repository, URI, a mark, then group, epoch, record as JSON, and job and JSON of the event (or twice "") of each.
-- Returns how many were new. What was forgotten after the mark was taken stays so.
local repository = ARGV[1]
local at = string.match(redis.call('HGET', P .. 'repositories', repository) or '0 ', '^%S+')
redis.call('HSET', P .. 'repositories', repository, at .. ' ' .. ARGV[2])
local new = 0
for i = 4, #ARGV, 5 do
  local group, epoch = ARGV[i], ARGV[i + 1]
  local name = group .. '@' .. epoch
  local forgotten = redis.call('ZSCORE', P .. 'forgotten:' .. repository, name)
  if not forgotten or tonumber(forgotten) <= tonumber(ARGV[3]) then
    if redis.call('HSETNX', P .. 'points:' .. repository, name, ARGV[i + 2]) == 1 then
      new = new + 1
      redis.call('SADD', P .. 'groups:' .. repository, group)
      redis.call('ZADD', P .. 'epochs:' .. repository .. ':' .. group, epoch, epoch)
    end
    redis.call('ZADD', P .. 'recorded:' .. repository, new_mark(), name)
    if ARGV[i + 4] ~= '' and redis.call('SADD', P .. 'told:' .. repository, name) == 1 then
      emit(ARGV[i + 3], 'RECOVERY_POINT', ARGV[i + 4])
    end
  end
end
return new
