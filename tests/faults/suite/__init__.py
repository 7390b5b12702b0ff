"""The fault cases that anyone can run: ``make faults``. One function each, on real processes, with a criterion and a figure."""
