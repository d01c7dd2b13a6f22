"""The control loop: reads the persisted state of each due job, takes the next step, persists it.

Level-triggered: a step depends on the state alone, never on how it came about, and every step is idempotent,
so killing the coordinator anywhere and starting it again is a normal day.
"""
