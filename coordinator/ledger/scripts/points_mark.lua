-- A mark greater than those of all recordings so far, and less than those of all to come.
-- Keys: mark (written).
return new_mark()
