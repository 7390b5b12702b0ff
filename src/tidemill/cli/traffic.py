"""``tidemill twin --traffic`` and ``tidemill record --traffic``: services and the requests that they get."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tidemill.cli.output import count, emit, note, paint, say, table
from tidemill.errors import Conflict, InvalidRequest, InvalidSpec
from tidemill.units import USD_MICRO, parse_duration

if TYPE_CHECKING:
    from tidemill.model.spec import Service
    from tidemill.twin.serving import Engine, Result, Rules
    from tidemill.twin.traffic import Request

_SYNTHETIC: Final = "synthetic"
_USUAL_SERVICE: Final[Mapping[str, Any]] = {"replicas": "0..8", "concurrency": 32}
"""What a model of the traffic is served by where no ``--service`` says it."""
_WHAT_IF: Final = "--what-if"
_CHANGES: Final = (
    "Change service.NAME.FIELD (replicas, concurrency, idle, wait, scaling.ttft and the like), engine.FIELD or load."
)


def play_traffic(
    source: str,
    *,
    services: Sequence[Path],
    engine: str,
    what_if: Sequence[str],
    set_: Sequence[str],
    requests: int,
    csv: Path | None,
    html: Path | None,
    json: bool,
) -> None:
    """Play requests against services as they are, and as they would be, and compare."""
    from tidemill.twin.serving import play
    from tidemill.twin.servingreport import figures, rows, write_csv, write_page
    from tidemill.twin.traffic import made, parse_mix, read_traffic

    if source.partition(":")[0] == _SYNTHETIC:
        mix = parse_mix(source.partition(":")[2])
        asked: list[Request] = list(made(mix))
        asked, span_ns = (asked[:requests] if requests else asked), mix.span_ns
    else:
        asked, span_ns = read_traffic(Path(source), limit=requests), 0
    given = _given(services, asked)
    rules, runs = _rules(), []
    named = [("as it is" if what_if else "run", [*set_]), ("what if", [*set_, *what_if])][: 1 + bool(what_if)]
    changed = [(name, *_changed(given, engine, changes)) for name, changes in named]
    made_services = [{model: _service(model, one) for model, one in specs.items()} for _, specs, _, _ in changed]
    objectives = {model: max(one[model].scaling.ttft_ns for one in made_services) for model in given}
    for (name, _, made_engine, load), specs in zip(changed, made_services, strict=True):
        began = time.monotonic()
        results = play(
            asked,
            specs,
            dict.fromkeys(specs, made_engine),
            rules,
            load=load,
            span_ns=round(span_ns / load) if requests == 0 else 0,
            objectives=objectives,
        )
        runs.append((name, results))
        note(f"{name}: {count(sum(one.requests for one in results), 'request')} in {time.monotonic() - began:.1f} s")
    if left := {one.model for one in asked} - set(given):
        note(f"passed over requests to {', '.join(sorted(left))[:200]}: no --service is for them", "yellow")
    if csv is not None:
        write_csv(csv, runs)
    if html is not None:
        write_page(html, runs, title=f"Twin of {source}" + (f": {', '.join(what_if)}" if what_if else ""))
    if json:
        told = [{"name": name, "services": [figures(one) for one in results]} for name, results in runs]
        emit({"traffic": source, "what_if": list(what_if), "runs": told})
    else:
        _show(runs, figures, rows)
    for path in filter(None, (csv, html)):
        note(f"wrote {path}")


def record_traffic(file: Path, *, json: bool) -> None:
    """Write what requests to models took, as the ledger has it, for ``twin --traffic``."""
    from tidemill.sdk.client import Client

    lines = 0
    try:
        with file.open("x", encoding="utf-8") as kept, Client() as client:
            for one in client.request_usages():
                told = {
                    "at_ns": one.at_ns,
                    "model": one.model,
                    "prompt_tokens": one.prompt_tokens,
                    "completion_tokens": one.completion_tokens,
                    "tenant": one.project_id,
                }
                kept.write(jsonlib.dumps(told, separators=(",", ":")) + "\n")
                lines += 1
    except FileExistsError as error:
        raise Conflict(
            "There is such a file already.", field="FILE", value=str(file), mend="Name another file."
        ) from error
    except OSError as error:
        raise InvalidRequest(f"The file cannot be made: {error.strerror}.", field="FILE", value=str(file)) from error
    if json:
        emit({"file": str(file), "requests": lines})
    else:
        say(f"recorded {count(lines, 'request')} in {file}")


# --- what a run is made of ---


def _given(files: Sequence[Path], asked: Iterable[Request]) -> dict[str, dict[str, Any]]:
    """The sections ``service`` by model: of the files, or the usual one for each model that is asked for."""
    from tidemill.sdk.specfile import load

    found: dict[str, dict[str, Any]] = {}
    for path in files:
        spec = load(path).spec
        section = spec.get("service") or {}
        if not isinstance(section, dict):
            raise InvalidSpec("It is no section.", field="service", value=str(section)[:80], mend="Write service: {}.")
        model = section.get("model") or spec.get("name") or path.stem
        _service(str(model), section)
        found[str(model)] = section
    if files:
        return found
    return {model: dict(_USUAL_SERVICE) for model in sorted({one.model for one in asked})}


def _service(model: str, section: Mapping[str, Any]) -> Service:
    """The service behind a section. Raises: InvalidSpec that names the field."""
    from tidemill.wire import read_spec

    spec = read_spec({"kind": "service", "run": "served", "service": {**section, "model": model}}, "service")
    if spec.service is None:
        raise InvalidSpec("It is no service.", field="service", value=model)
    return spec.service


def _rules() -> Rules:
    """The gateway's own line and choice."""
    from tidemill.gateway.journey import CAUTION
    from tidemill.gateway.server import Limits
    from tidemill.gateway.table import Replica, Route
    from tidemill.gateway.waiting import Line
    from tidemill.twin.serving import Rules

    return Rules(
        line=Line,
        replica=lambda name: Replica(job=name, host="twin", port=1, prefix=b""),
        route=lambda model, seats, concurrency: Route(
            model=model, project="", service=model, replicas=tuple(seats), concurrency=concurrency
        ),
        caution=CAUTION,
        most_waiting=Limits().waiting,
    )


def _changed(
    given: Mapping[str, dict[str, Any]], engine: str, changes: Sequence[str]
) -> tuple[dict[str, dict[str, Any]], Engine, float]:
    """The services, the engine and how many times as fast requests come, with all changes."""
    specs = {model: jsonlib.loads(jsonlib.dumps(section)) for model, section in given.items()}
    parts, load = [engine] if engine else [], 1.0
    for text in changes:
        name, equals, value = (piece.strip() for piece in text.partition("="))
        if not equals or not value:
            raise _wrong(text, f"{text!r} is not NAME=VALUE.")
        if name == "load":
            load *= _number(value, text)
            if not 0.001 <= load <= 1_000:
                raise _wrong(text, "load lies between 0.001 and 1000.")
        elif name.startswith("engine."):
            parts.append(f"{name.removeprefix('engine.')}={value}")
        elif name.startswith("service."):
            _set(specs, name.removeprefix("service."), value, text)
        else:
            raise _wrong(text, f"{name!r} is nothing that can be changed of services.")
    return specs, _engine(",".join(parts)), load


def _set(specs: dict[str, dict[str, Any]], path: str, value: str, text: str) -> None:
    """Change a field of a service; its name may have dots in it."""
    model = next((one for one in sorted(specs, key=len, reverse=True) if path.startswith(one + ".")), None)
    if model is None:
        raise _wrong(text, f"There is no service of that name. Services: {', '.join(sorted(specs)) or 'none'}.")
    section = specs[model]
    *outer, last = path.removeprefix(model + ".").split(".")
    for name in outer:
        section = section.setdefault(name, {})
        if not isinstance(section, dict):
            raise _wrong(text, f"{name} has no fields.")
    section[last] = {"true": True, "false": False}.get(value, int(value) if value.isdecimal() else value)
    try:
        _service(model, specs[model])
    except InvalidSpec as error:
        raise _wrong(text, error.detail, error.mend) from error


def _engine(text: str) -> Engine:
    """The engine in ``gpu=H100,prefill=8000,start=60s``; its price and power are those of its GPUs."""
    from tidemill import catalog
    from tidemill.twin.fleet import find_device
    from tidemill.twin.serving import Engine

    values: dict[str, Any] = {}
    gpu, gpus, price = "", 1, None
    known = {item.name: item for item in fields(Engine) if item.name in ("prefill", "decode", "batch", "cache")}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if name == "start" and equals:
            try:
                values["start_ns"] = parse_duration(value)
            except ValueError as error:
                raise _wrong(part, f"{value!r} is not a time.", field="--engine") from error
        elif name == "gpu" and equals:
            gpu = value
        elif name in ("gpus", "price") and equals:
            number = _number(value, part, field="--engine")
            gpus, price = (max(1, round(number)), price) if name == "gpus" else (gpus, number)
        elif name in known and equals:
            number = _number(value, part, field="--engine")
            values[name] = round(number) if name == "cache" else number
        else:
            mend = f"Set gpu, gpus, price, start, {', '.join(known)} with name=value."
            raise _wrong(text, f"{part!r} sets nothing of an engine.", mend, field="--engine")
    device = find_device(gpu) if gpu else None
    if gpu and device is None:
        near = ", ".join(catalog.nearest_names(gpu))
        raise _wrong(gpu, f"There is no GPU model {gpu!r}.", f"Did you mean {near}?" if near else "", field="--engine")
    try:
        made = Engine(**values)
    except ValueError as error:
        raise _wrong(text, f"{error}.", field="--engine") from error
    if device is not None:
        hour = catalog.rate_card({}).micro_per_hour(device.model)
        made = replace(made, price_micro=hour * gpus, idle_mw=device.idle_mw * gpus, busy_mw=device.busy_mw * gpus)
    return made if price is None else replace(made, price_micro=round(price * USD_MICRO))


def _number(value: str, text: str, *, field: str = _WHAT_IF) -> float:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0 < number < 1e12:
        raise _wrong(text, f"{value!r} is not a number above zero.", field=field)
    return number


def _wrong(value: str, what: str, mend: str = "", *, field: str = _WHAT_IF) -> InvalidRequest:
    return InvalidRequest(what, field=field, value=value, mend=mend or (_CHANGES if field == _WHAT_IF else ""))


# --- how it looks ---


def _show(
    runs: Sequence[tuple[str, Sequence[Result]]],
    figures: Callable[[Result], dict[str, Any]],
    rows: Callable[[Sequence[dict[str, Any]]], list[tuple[str, list[str], str, int]]],
) -> None:
    colours = {1: "green", -1: "red", 0: "muted"}
    headings = [*(name for name, _ in runs), *(["change"] if len(runs) > 1 else [])]
    for number, first in enumerate(runs[0][1]):
        if number:
            say()
        found = [figures(results[number]) for _, results in runs]
        lines = [
            [name, *values, *([paint(difference, colours[verdict])] if len(runs) > 1 else [])]
            for name, values, difference, verdict in rows(found)
        ]
        table([first.name, *headings], lines)
