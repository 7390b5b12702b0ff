"""One way to make a changed copy of any value of the model.

Most values are frozen dataclasses. Those that are made by the million (jobs, attempts, allocations, usage, ledger
lines, log entries, changes, commands, what workers report) are msgspec structs: just as frozen, compared and printed
the same, five times cheaper to make and thirty times cheaper to copy with a change.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from msgspec import Struct, structs

Value = TypeVar("Value")


def replace(value: Value, **changes: Any) -> Value:
    """A copy with these fields changed. Raises: TypeError when there is no such field."""
    if isinstance(value, Struct):
        return structs.replace(value, **changes)
    copied: Any = value
    return dataclasses.replace(copied, **changes)  # type: ignore[no-any-return]
