"""``tidemill compat``: what becomes of each field of a file that was written for another tool."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidemill.cli.output import clip, emit, note, paint, say, table
from tidemill.cli.parsing import Json
from tidemill.cli.running import read_file
from tidemill.errors import ErrorKind

if TYPE_CHECKING:
    from tidemill.sdk.compat import Reading, Translation

_WIDEST = 40
_File = Annotated[str, typer.Argument(metavar="FILE", help="A file of another tool; - for standard input.")]
_From = Annotated[
    str | None,
    typer.Option("--from", metavar="TOOL", help="Whose file it is: skypilot, dstack, slurm or tidemill."),
]
_Env = Annotated[list[str] | None, typer.Option("--env", "-e", metavar="KEY=VALUE", help="As for run; repeatable.")]


def compat_command(
    file: _File,
    tool: _From = None,
    spec: Annotated[bool, typer.Option("--spec", help="Print the Tidemill spec that it becomes, as YAML.")] = False,
    env: _Env = None,
    json: Json = False,
) -> int:
    """What becomes of each field of a SkyPilot task file, a dstack configuration or an sbatch script.

    Exits with 2 when a field has no equivalent. Submits nothing.

    Examples: tidemill compat train.sky.yaml; tidemill compat job.sh --spec
    """
    reading = read_file(file, tool=tool, env=tuple(env or ()), is_said=False)
    translation = reading.translation.checked() if reading.translation is not None else None
    refused = translation.refused if translation is not None else ()
    status = ErrorKind.INVALID.exit_status if refused else 0
    if json:
        emit(_as_json(reading, translation))
        return status
    if spec:
        if not refused:
            say(spec_yaml(reading.file.spec).rstrip())
        for one in refused:
            note(f"{file}:{one.line}: {one.field}: {one.reason} {one.instead}", "red")
        return status
    say(f"{file} is read as {reading.title}" + (f"; {reading.doubt}: --from decides" if reading.doubt else ""))
    if translation is None:
        return 0
    say()
    rows = [
        (one.field, clip(one.value, _WIDEST), one.becomes or paint("–", "muted"), one.note)
        for one in translation.mapped
    ]
    table(("field", "value", "becomes", "note"), rows, flexible=3)
    if refused:
        say()
        heading = "field is refused" if len(refused) == 1 else "fields are refused"
        say(paint(f"{len(refused)} {heading}, so it cannot be run:", "red"))
        for one in refused:
            where = f"line {one.line}, " if one.line else ""
            say(f"  {where}{paint(one.field, 'bold')}: {one.value}")
            say(f"    {one.reason}" + (f" {paint(one.instead, 'cyan')}" if one.instead else ""))
    else:
        say()
        say(f"nothing is refused: tidemill run {file}")
    return status


def spec_yaml(spec: dict[str, Any]) -> str:
    """A spec as YAML, with scripts as blocks of text."""
    import yaml

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        style = "|" if "\n" in value else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    dumped: str = yaml.dump(spec, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=1_000)
    return dumped


def _as_json(reading: Reading, translation: Translation | None) -> dict[str, Any]:
    found: dict[str, Any] = {"file": reading.file.source, "tool": reading.tool.value, "doubt": reading.doubt}
    if translation is None:
        return {**found, "mapped": [], "refused": [], "spec": reading.file.spec}
    mapped = [
        {"field": one.field, "value": one.value, "becomes": one.becomes, "note": one.note, "line": one.line}
        for one in translation.mapped
    ]
    refused = [
        {"field": one.field, "value": one.value, "reason": one.reason, "instead": one.instead, "line": one.line}
        for one in translation.refused
    ]
    return {**found, "mapped": mapped, "refused": refused, "spec": translation.spec}
