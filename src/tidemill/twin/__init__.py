"""The other shell: the same driver over virtual time, fed by traces, recordings or a synthetic mix.

It decides nothing. What it adds to the driver is a clock, machines that answer commands with facts, readers of
traces, and measures of what came of it.
"""
