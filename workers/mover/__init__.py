"""Claim, copy, flush, finish: a mover's work on one unit at a time."""
