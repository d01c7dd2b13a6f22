-- Whether the server's run is the one that a leader adopted.
-- Keys: run (string, read).
-- Returns 1 or 0.
local run = string.match(redis.call('INFO', 'server'), 'run_id:(%x+)')
return redis.call('GET', P .. 'run') == run and 1 or 0
