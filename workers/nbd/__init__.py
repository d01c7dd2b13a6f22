"""NBD, this project's trade: a client that keeps as many requests in flight as it has calling threads, and a server.

    Session          several connections to one export used as one (session)
      Connection     one connection: reads, writes, block status, the FLUSH rule (connection)
        channel      who sends and who receives: leader and followers on a plain socket (channel),
                     one thread with a selector under TLS (tls_channel)
        replies      the peer's replies, parsed without I/O (replies)
        handshake    option haggling, TLS, meta contexts (handshake)
    Server           serves disks of this process to any client (server, which draws its parts; served, the contract)
    wire             formats and parsers (wire; server_wire for the server's half)

What crosses from the client to the rest of the program is `DiskIOError` after a connection stands, and
`UnavailableError`, `NotFoundError`, `RefusedError` or `UsageError` before.
"""
