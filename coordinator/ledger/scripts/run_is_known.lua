-- Whether the server's run is the one that a leader adopted.
-- Keys: run (string, read).
-- Returns 1 or 0.
return redis.call('GET', P .. 'run') == server_run() and 1 or 0
