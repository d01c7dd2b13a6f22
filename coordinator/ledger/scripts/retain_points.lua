-- Forget the points of a group that a listing did not find, except those recorded after it began.
-- Keys: groups:*, points:*, epochs:*, recorded:*, told:*, forgotten:*, mark (written).
-- ARGV: repository, group, mark, then the epochs that were found.
-- Returns how many were forgotten.
local found, forgotten = {}, 0
for i = 4, #ARGV do
  found[ARGV[i]] = true
end
for _, epoch in ipairs(redis.call('ZRANGE', P .. 'epochs:' .. ARGV[1] .. ':' .. ARGV[2], 0, -1)) do
  local mark = redis.call('ZSCORE', P .. 'recorded:' .. ARGV[1], ARGV[2] .. '@' .. epoch)
  if not found[epoch] and tonumber(mark) <= tonumber(ARGV[3]) then
    forget_point(ARGV[1], ARGV[2], epoch)
    forgotten = forgotten + 1
  end
end
forget_group_if_empty(ARGV[1], ARGV[2])
return forgotten
