-- Leave leadership; the generation stays, so that the next term's is greater.
-- Keys: leader (hash, written).
-- ARGV: generation, nonce.
if not deposed(ARGV[1], ARGV[2]) then
  redis.call('HDEL', P .. 'leader', 'nonce', 'until')
end
