"""A whole cloud in one thread: the real control plane over machines, links, disks and clocks that exist only as values.

Nothing happens but what is stepped, nothing is left to chance but by the seed: one seed and one commit are one history.
``machines`` is the truth, which the control plane never sees but through its engines; ``cloud`` is what can be done and
what goes wrong; ``auditor`` joins the machines' journal, the store and the answers that users got; ``planted`` are bugs
that the auditor has to find. ``python -m tests.faults.simulation --help`` plays as many seeds as it is told.
"""
