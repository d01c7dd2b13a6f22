-- Leave leadership; the generation stays, so that the next term's is greater.
-- Keys: leader (hash, written), leases, hold (read), run (written).
-- ARGV: generation, nonce.
if leads(ARGV[1], ARGV[2]) then
  redis.call('HDEL', P .. 'leader', 'nonce', 'until')
  -- Nobody holds a lease, and nobody is granted one before the next leader has adopted the server's run, be it this
  -- one or a new one: it need not wait for anybody, see adopt_run. Not while holders may live whom the ledger forgot.
  if not held_back() and redis.call('EXISTS', P .. 'leases') == 0 then
    redis.call('DEL', P .. 'run')
  end
end
