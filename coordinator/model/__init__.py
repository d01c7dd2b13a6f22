"""What a job, an extent, a work unit and an error are, and every decision about them.

Law: no I/O, no clock, no Redis, no randomness in this package. Whatever is decided here is decided from
its arguments alone, so it needs no mock to be tested.
"""
