"""The face of Flushpoint: the client library (`flushpoint.client`), the command, the embedded stack.

Law: of our packages only `coordinator.model` is imported here; the other parts are started by their commands.
"""
