-- Remember recovery points, and by which URI their repository is named.
-- Keys: repositories, groups:*, points:*, epochs:*, recorded:*, marks, events (written).
-- ARGV: repository, URI, then group, epoch, record as JSON, and job and JSON of the event (or twice "") of each.
-- Returns how many were new.
local repository = ARGV[1]
local at = string.match(redis.call('HGET', P .. 'repositories', repository) or '0 ', '^%S+')
redis.call('HSET', P .. 'repositories', repository, at .. ' ' .. ARGV[2])
local new = 0
for i = 3, #ARGV, 5 do
  local group, epoch = ARGV[i], ARGV[i + 1]
  local name = group .. '@' .. epoch
  if redis.call('HSETNX', P .. 'points:' .. repository, name, ARGV[i + 2]) == 1 then
    new = new + 1
    redis.call('SADD', P .. 'groups:' .. repository, group)
    redis.call('ZADD', P .. 'epochs:' .. repository .. ':' .. group, epoch, epoch)
    if ARGV[i + 4] ~= '' then
      emit(ARGV[i + 3], 'RECOVERY_POINT', ARGV[i + 4])
    end
  end
  redis.call('ZADD', P .. 'recorded:' .. repository, redis.call('INCR', P .. 'marks'), name)
end
return new
