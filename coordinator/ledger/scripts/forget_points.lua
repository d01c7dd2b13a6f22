-- Forget recovery points of a group.
-- Keys: groups:*, points:*, epochs:*, recorded:*, told:*, forgotten:*, mark (written).
-- ARGV: repository, group, then epochs.
for i = 3, #ARGV do
  forget_point(ARGV[1], ARGV[2], ARGV[i])
end
forget_group_if_empty(ARGV[1], ARGV[2])
