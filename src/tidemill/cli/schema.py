"""``tidemill schema``: the JSON Schema of workload files, for editors and programs."""

from __future__ import annotations

from tidemill.cli.output import emit
from tidemill.cli.parsing import Json


def schema_command(json: Json = False) -> None:
    """The JSON Schema of workload files; needs no running cloud."""
    del json  # it is JSON in any case
    from tidemill import wire

    emit(wire.json_schema())
