"""``tidemill twin``, ``tidemill record`` and ``tidemill replay``: other conditions tried on virtual time."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidemill.cli.output import count, emit, note, paint, say, table
from tidemill.cli.parsing import Json
from tidemill.errors import InvalidRequest, TidemillError
from tidemill.units import SECOND_NS, format_duration, parse_duration

if TYPE_CHECKING:
    from tidemill.twin.arrivals import Stream
    from tidemill.twin.cloud import Conditions
    from tidemill.twin.replay import Changed, Outcome, Replayed
    from tidemill.twin.run import Result
    from tidemill.twin.traces import Trace
    from tidemill.twin.whatif import Change

_SHOWN = 20
_CHANGED = 1

_Trace = Annotated[
    str | None, typer.Option("--trace", metavar="NAME", help="A public trace: openb, philly, muri, gavel or pai.")
]
_File = Annotated[Path | None, typer.Option("--file", metavar="FILE", help="The trace's file, if not the shipped one.")]
_Synthetic = Annotated[
    str | None, typer.Option("--synthetic", metavar="MIX", help="A mix such as jobs=10000,seed=1,load=0.9,median=2h.")
]
_Recorded = Annotated[Path | None, typer.Option("--recorded", metavar="FILE", help="A file of tidemill record.")]
_Nodes = Annotated[
    str | None,
    typer.Option("--nodes", metavar="FLEET", help="Machines: 64xH100:8, 4xA100:4:96:1TB, 8xcpu:64; openb: a file."),
]
_WhatIf = Annotated[
    list[str] | None,
    typer.Option("--what-if", metavar="NAME=VALUE", help="Run again with this changed and compare; repeatable."),
]
_Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change it in every run; repeatable.")
]


def twin_command(
    trace: _Trace = None,
    file: _File = None,
    synthetic: _Synthetic = None,
    recorded: _Recorded = None,
    traffic: Annotated[
        str | None,
        typer.Option(
            "--traffic", metavar="FILE", help="Requests to services: a file, or synthetic:rate=5,span=1d,burst=3."
        ),
    ] = None,
    service: Annotated[
        list[Path] | None,
        typer.Option("--service", metavar="FILE", help="With --traffic: a service's workload file; repeatable."),
    ] = None,
    engine: Annotated[
        str, typer.Option("--engine", metavar="NUMBERS", help="With --traffic: gpu=H100,prefill=8000,start=60s.")
    ] = "",
    requests: Annotated[
        int | None, typer.Option("--requests", metavar="N", min=1, help="With --traffic: only the first so many.")
    ] = None,
    nodes: _Nodes = None,
    what_if: _WhatIf = None,
    set_: _Set = None,
    jobs: Annotated[int | None, typer.Option("--jobs", metavar="N", min=1, help="Only the first so many.")] = None,
    until: Annotated[str | None, typer.Option("--until", metavar="TIME", help="Stop after so much, as 30d.")] = None,
    country: Annotated[str, typer.Option("--country", metavar="CODE", help="Whose electricity it uses.")] = "",
    cores_per_gpu: Annotated[
        int, typer.Option("--cores-per-gpu", metavar="N", min=1, help="Of a trace that does not say.")
    ] = 1,
    throughputs: Annotated[
        Path | None, typer.Option("--throughputs", metavar="FILE", help="Gavel's table of throughputs.")
    ] = None,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write the series and tenants.")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with charts.")] = None,
    record: Annotated[Path | None, typer.Option("--record", metavar="FILE", help="Write the turns for replay.")] = None,
    json: Json = False,
) -> None:
    """Run work through the scheduler on virtual time, and compare what would be otherwise.

    The work is a public trace, a synthetic mix or a recording of this installation; or traffic to services, of which
    the replicas follow the requests.

    Examples: tidemill twin --synthetic jobs=5000,load=0.9 --nodes 16xH100:8 --what-if nodes=+4xH100:8;
    tidemill twin --trace philly --file philly.csv.gz --nodes 64xH100:8 --html philly.html;
    tidemill twin --traffic monday.jsonl --service chat.yaml --what-if service.chat.scaling.ttft=500ms
    """
    for path, field in ((csv, "--csv"), (html, "--html"), (record, "--record")):
        _may_write(path, field)
    with_jobs = {"--trace": trace, "--synthetic": synthetic, "--recorded": recorded, "--nodes": nodes, "--jobs": jobs}
    with_jobs |= {"--until": until, "--record": record, "--country": country}
    with_traffic = {"--service": service, "--engine": engine, "--requests": requests}
    for name, value in (with_jobs if traffic else with_traffic).items():
        if value:
            reason = "cannot go together with --traffic" if traffic else "needs --traffic"
            raise InvalidRequest(f"{name} {reason}.", field=name, value=str(value), mend="Leave one of them out.")
    if traffic:
        from tidemill.cli.traffic import play_traffic

        play_traffic(
            traffic,
            services=service or (),
            engine=engine,
            what_if=what_if or (),
            set_=set_ or (),
            requests=requests or 0,
            csv=csv,
            html=html,
            json=json,
        )
        return
    from tidemill.twin.page import write_page
    from tidemill.twin.report import figures, write_csv
    from tidemill.twin.whatif import apply, parse_change

    sources = (("--trace", trace), ("--synthetic", synthetic), ("--recorded", recorded))
    given = [name for name, value in sources if value]
    if len(given) != 1:
        raise InvalidRequest(
            f"{' and '.join(given)} cannot go together." if given else "There is no work.",
            field=given[-1] if given else "--trace",
            value="",
            mend="Give one of --trace NAME, --synthetic MIX, --recorded FILE and --traffic FILE.",
        )
    if file is not None and trace is None:
        raise InvalidRequest("There is no --trace for it.", field="--file", value=str(file), mend="Add --trace NAME.")
    with _naming("--set"):
        set_changes = [parse_change(text) for text in set_ or ()]
        base = apply(set_changes, _conditions(recorded, nodes, trace, country))
    with _naming("--what-if"):
        changes = [parse_change(text) for text in what_if or ()]
        other = apply(changes, base)
    end_ns = _duration(until) if until else 0
    source = _Source(trace, file, synthetic, recorded, base, cores_per_gpu, throughputs, jobs)
    runs = [("as it is" if changes else "run", base, set_changes)]
    if changes:
        runs.append(("what if", other, [*set_changes, *changes]))
    results: list[tuple[str, Result]] = []
    for name, conditions, made in runs:
        began = time.monotonic()
        result = _play(source.stream(made), conditions, end_ns, record if not results else None)
        results.append((name, result))
        note(f"{name}: {count(result.measures.submitted_jobs, 'job')} in {time.monotonic() - began:.1f} s")
    for reason, number in sorted(source.skipped.items()):
        note(f"passed over {count(number, 'row')} of the trace: {reason}")
    if csv is not None:
        write_csv(csv, results)
    if html is not None:
        write_page(html, results, title=f"Twin of {source.name}" + (f": {', '.join(what_if or ())}" if changes else ""))
    if json:
        told = [{"name": name, **figures(result)} for name, result in results]
        emit({"work": source.name, "what_if": list(what_if or ()), "runs": told})
    else:
        _show(results)
    for path in filter(None, (csv, html, record)):
        note(f"wrote {path}")


def record_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A new file, such as monday.jsonl.gz.")],
    for_: Annotated[str | None, typer.Option("--for", metavar="TIME", help="For so long, such as 2h.")] = None,
    traffic: Annotated[
        bool, typer.Option("--traffic", help="The project's requests to models so far, for tidemill twin --traffic.")
    ] = False,
    json: Json = False,
) -> None:
    """Save the turns that the scheduler takes, until Ctrl-C. Needs an administrator's token.

    With --traffic: what requests to models took so far, without their words.
    """
    if traffic:
        from tidemill.cli.traffic import record_traffic

        if for_:
            raise InvalidRequest("--traffic is about what was.", field="--for", value=for_, mend="Leave it out.")
        record_traffic(file, json=json)
        return
    from tidemill.sdk import connection
    from tidemill.sdk.transport import Transport
    from tidemill.twin.recording import RecordingFile

    left_s = _duration(for_, "--for") / SECOND_NS if for_ else 0.0
    turns = -2  # the first two lines say what the file is, and what there was at first
    rest = b""
    found = connection.find(None, None)
    http = Transport(found.url, found.token, others=found.others, ca=found.ca)
    with http.open("GET", "/v1/turns") as pieces, RecordingFile(file) as kept:
        note("recording; Ctrl-C ends it" if not for_ else f"recording for {for_}")
        began = time.monotonic()
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # what runs it as a service ends it so
        try:
            for piece in pieces:
                *lines, rest = (rest + piece).split(b"\n")
                for line in filter(None, lines):
                    kept.write(line + b"\n")
                    turns += 1
                kept.flush()
                if left_s and time.monotonic() - began >= left_s:
                    break
        except KeyboardInterrupt:
            note("")
    if json:
        emit({"file": str(file), "turns": max(turns, 0)})
    else:
        say(f"recorded {count(max(turns, 0), 'turn')} in {file}")


def replay_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of tidemill record.")],
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="Show so many changes.")] = _SHOWN,
    json: Json = False,
) -> int:
    """Take recorded turns again with the present code, and show each decision that came out otherwise.

    Exits with 0 when all was decided as before, with 1 when not.
    """
    from tidemill.twin.replay import replay

    found = replay(file)
    if json:
        emit(
            {
                "turns": found.turns,
                "decisions": found.decisions,
                "changed": [_changed_json(one) for one in found.changed],
            }
        )
    else:
        _show_replayed(found, limit)
    return 0 if found.is_same else _CHANGED


# --- what a run is made of ---


class _Source:
    """Where work comes from; each run reads it anew."""

    def __init__(
        self,
        trace: str | None,
        file: Path | None,
        synthetic: str | None,
        recorded: Path | None,
        base: Conditions,
        cores_per_gpu: int,
        throughputs: Path | None,
        jobs: int | None,
    ) -> None:
        from tidemill.twin.synthetic import parse_synthetic
        from tidemill.twin.traces import Reading

        self.name = trace or (f"the mix {synthetic}" if synthetic else "the recording")
        self.skipped: dict[str, int] = {}
        self._recorded, self._jobs, self._file = recorded, jobs, file
        self._trace_name = trace or ""
        self._mix = parse_synthetic(synthetic) if synthetic else None
        self._gpus = sum(len(node.devices) for node in base.nodes)
        self._per_node = max((len(node.devices) for node in base.nodes), default=0) or 1
        self._reading = Reading(per_node=self._per_node, throughputs=throughputs, cores_per_gpu=cores_per_gpu)
        self._trace: Trace | None = None

    def stream(self, changes: list[Change]) -> Stream:
        """The work, from its first item. Sizes follow the fleet without changes, so runs have the same work."""
        from tidemill.twin.whatif import faster

        speed = 1.0
        for change in changes:
            speed *= change.speeds
        stream = self._all()
        yield from faster(islice(stream, self._jobs) if self._jobs else stream, speed)
        if self._trace is not None:
            self.skipped = dict(self._trace.skipped)

    def _all(self) -> Stream:
        from tidemill.twin.history import recorded_stream
        from tidemill.twin.synthetic import arrivals
        from tidemill.twin.traces import read_trace

        if self._recorded is not None:
            return recorded_stream(self._recorded)
        if self._mix is not None:
            return arrivals(self._mix, gpus=self._gpus, per_node=self._per_node)
        self._trace = read_trace(self._trace_name, self._file, self._reading)
        return self._trace.arrivals


def _conditions(recorded: Path | None, nodes: str | None, trace: str | None, country: str) -> Conditions:
    """The fleet, prices and place of a run before anything is changed."""
    from dataclasses import replace

    from tidemill.catalog import carbon_intensity, rate_card
    from tidemill.twin.cloud import SITE, Conditions
    from tidemill.twin.fleet import MEND, parse_fleet
    from tidemill.twin.history import recorded_conditions
    from tidemill.twin.traces import SHIPPED_NODES, openb_nodes, shipped

    if recorded is not None and not nodes:
        with _naming("--recorded"):
            return recorded_conditions(recorded)
    if not nodes and trace == "openb":
        nodes = str(shipped(SHIPPED_NODES))
    if not nodes:
        raise InvalidRequest("There is no fleet.", field="--nodes", value="", mend=MEND)
    is_file = trace == "openb" and (nodes.endswith((".csv", ".gz")) or Path(nodes).exists())
    fleet = openb_nodes(Path(nodes)) if is_file else parse_fleet(nodes)
    if recorded is not None:
        with _naming("--recorded"):
            known = recorded_conditions(recorded)
            home = known.sites[0].id
            return replace(known, nodes=tuple(replace(node, site_id=home) for node in fleet))
    with _naming("--country"):
        carbon = carbon_intensity(country)
    site = replace(SITE, carbon_mg_per_kwh=carbon.mg_per_kwh, carbon_source=carbon.source)
    return Conditions(nodes=fleet, rates=rate_card({}), sites=(site,))


def _play(stream: Stream, conditions: Conditions, end_ns: int, record: Path | None) -> Result:
    from tidemill.control.recording import Recording
    from tidemill.twin.cloud import beginning_of
    from tidemill.twin.recording import RecordingFile
    from tidemill.twin.run import run

    with ExitStack() as stack:
        watch = None
        if record is not None:
            with _naming("--record"):
                recording = Recording(stack.enter_context(RecordingFile(record)).write)
            made = beginning_of(conditions)
            recording.begin(
                made.snapshot,
                sites=made.sites,
                projects=made.projects,
                rates=made.rates,
                policy=made.policy,
                now=made.now,
            )
            watch = recording.turn
        return run(stream, conditions, watch=watch, until_ns=end_ns)


@contextmanager
def _naming(option: str) -> Iterator[None]:
    """Errors inside name the option that they are about, where they do not name another."""
    try:
        yield
    except TidemillError as error:
        if not error.field.startswith("--") or error.field == "--what-if":
            error.field = option
        raise


def _may_write(path: Path | None, field: str) -> None:
    """Find out before the run whether its results can be written."""
    if path is not None and not path.parent.is_dir():
        raise InvalidRequest("There is no such folder.", field=field, value=str(path.parent), mend="Make it first.")


def _duration(text: str, field: str = "--until") -> int:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise InvalidRequest(f"{error}.", field=field, value=text) from error


# --- how it looks ---


def _show(results: list[tuple[str, Result]]) -> None:
    from tidemill.twin.report import figures, rows

    found = [figures(result) for _, result in results]
    colours = {1: "green", -1: "red", 0: "muted"}
    headings = ["", *(name for name, _ in results), *(["change"] if len(results) > 1 else [])]
    lines = [
        [name, *values, *([paint(difference, colours[verdict])] if len(results) > 1 else [])]
        for name, values, difference, verdict in rows(found)
    ]
    table(headings, lines)
    for (name, result), one in zip(results, found, strict=True):
        if reasons := one["jobs"]["refused"]:
            told = ", ".join(f"{number} {code}" for code, number in reasons.items())
            note(f"{name}: refused at the door: {told}; see tidemill's reasons", "yellow")
        if result.left:
            note(f"{name}: {count(result.left, 'job')} would wait for ever", "yellow")


def _show_replayed(found: Replayed, limit: int) -> None:
    said = f"{count(found.turns, 'turn')}, {count(found.decisions, 'decision')}"
    if found.is_same:
        say(f"{said}: {paint('all as before', 'green')}")
        return
    say(f"{said}: {paint(f'{len(found.changed)} changed', 'red')}")
    rows = [
        [_at(one.at_ns, found.begun_ns), one.job_id or "books", one.what, _told(one.before, one), _told(one.after, one)]
        for one in islice(found.changed, limit)
    ]
    table(("at", "job", "decision", "before", "now"), rows, flexible=4)
    if len(found.changed) > limit:
        note(f"… and {len(found.changed) - limit} more; --limit shows them")


def _at(at_ns: int, begun_ns: int) -> str:
    return f"+{format_duration(max(at_ns - begun_ns, 0))}"


def _told(outcome: Outcome | None, changed: Changed) -> str:
    if outcome is None:
        return "not decided"
    later = outcome.at_ns - changed.at_ns
    return outcome.value + (f" ({format_duration(later)} later)" if later else "")


def _changed_json(one: Changed) -> dict[str, Any]:
    def side(outcome: Outcome | None) -> dict[str, Any] | None:
        return {"at_ns": outcome.at_ns, "value": outcome.value} if outcome is not None else None

    return {"job": one.job_id, "what": one.what, "before": side(one.before), "after": side(one.after)}
