-- Whether anybody leads.
-- Keys: leader (hash, read).
-- Returns 1 or 0.
local over = redis.call('HGET', P .. 'leader', 'until')
return over and tonumber(over) > now_ms and 1 or 0
