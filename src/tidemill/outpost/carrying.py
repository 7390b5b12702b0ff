"""A call of an engine, carried out: the one place where calls become methods, and errors become answers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from tidemill.errors import EngineLost, EngineRefused, TidemillError
from tidemill.ports import Engine
from tidemill.wire.outposts import EngineAnswer, EngineCall

log = logging.getLogger(__name__)
MOST_READ: Final = 8 << 20
"""Octets of a file that one answer has at most."""


def carry_out(engine: Engine, call: EngineCall) -> EngineAnswer:
    """What came of it; never raises."""
    try:
        match call.method:
            case "launch" if call.spec is not None:
                engine.launch(call.spec)
            case "stop":
                engine.stop(call.launch_id, node_id=call.node_id, grace_ns=call.grace_ns)
            case "forget":
                engine.forget(call.launch_id, node_id=call.node_id)
            case "observe":
                sight = engine.observe()
                looked_at = tuple(sorted(sight.nodes))
                return EngineAnswer(number=call.number, seen=sight.launches, looked_at=looked_at, cached=sight.cached)
            case "nodes":
                return EngineAnswer(number=call.number, nodes=engine.nodes())
            case "read":
                return EngineAnswer(number=call.number, content=_read(call))
            case _:
                detail = f"this version cannot {call.method} here"
                return EngineAnswer(number=call.number, outcome=EngineRefused.code, detail=detail)
    except TidemillError as error:
        return EngineAnswer(
            number=call.number, outcome=error.code, detail=error.detail, field=error.field, mend=error.mend
        )
    except Exception as error:
        log.exception("%s failed", call.method)
        detail = f"{type(error).__name__}: {error}"
        return EngineAnswer(number=call.number, outcome=EngineLost.code, detail=detail)
    return EngineAnswer(number=call.number)


def _read(call: EngineCall) -> bytes:
    """Part of a file of a data set that this machine has. Raises: EngineRefused when it cannot be read."""
    try:
        with Path(call.path).open("rb") as file:
            file.seek(call.offset)
            return file.read(min(call.size, MOST_READ))
    except OSError as error:
        raise EngineRefused(f"{call.path} cannot be read: {error.strerror or error}") from error
