"""NBD, this project's trade: a client in pure Python that keeps as many requests in flight as it has calling threads.

    Session          several connections to one export used as one (session)
      Connection     one connection: reads, writes, block status, the FLUSH rule (connection)
        channel      who sends and who receives: leader and followers on a plain socket (channel),
                     one thread with a selector under TLS (tls_channel)
        replies      the peer's replies, parsed without I/O (replies)
        handshake    option haggling, TLS, meta contexts (handshake)
    wire             formats and parsers (wire)

What crosses to the rest of the program is `DiskIOError` after a connection stands, and `UnavailableError`,
`NotFoundError`, `RefusedError` or `UsageError` before.
"""
