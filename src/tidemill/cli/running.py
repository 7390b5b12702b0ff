"""The work behind ``tidemill run`` and ``tidemill logs``, without the command line's parser.

``tidemill run -- COMMAND`` comes here directly, because reading options would take longer than all the rest.

Ctrl-C while a run is attached asks the job to stop, with its grace; Ctrl-C again detaches. A run that
is detached, or only followed with ``logs``, is never stopped by it.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from tidemill.cli.output import count, emit, emit_line, note, paint, say, show_error
from tidemill.cli.ticker import Ticker
from tidemill.errors import Conflict, InvalidRequest, TidemillError
from tidemill.sdk.client import Client
from tidemill.sdk.results import Job, JobUpdate, LogChunk, Workload
from tidemill.units import format_duration, format_size

if TYPE_CHECKING:
    from tidemill.sdk.compat import Reading
    from tidemill.sdk.specfile import SpecFile

INTERRUPTED = 130
_PLAIN_FLAGS = ("name", "max_duration", "expected_duration", "start_after", "start_before", "reservation")
_ACTIVE = ("queued", "starting", "running", "stopping")


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line says about a run; None and empty leave the file's word, or the default."""

    file: str = ""
    tool: str | None = None
    command: tuple[str, ...] = ()
    gpus: str | None = None
    cpus: float | None = None
    memory: str | None = None
    nodes: str | None = None
    name: str | None = None
    env: tuple[str, ...] = ()
    secret: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    model: str | None = None
    volume: tuple[str, ...] = ()
    python: str | None = None
    package: tuple[str, ...] = ()
    workdir: str | None = None
    priority: str | None = None
    project: str | None = None
    max_duration: str | None = None
    expected_duration: str | None = None
    start_after: str | None = None
    start_before: str | None = None
    after: tuple[str, ...] = ()
    is_spot: bool = False
    reservation: str | None = None
    within: str | None = None
    site: tuple[str, ...] = ()
    country: tuple[str, ...] = ()
    weigh: str | None = None
    retry: int | None = None
    is_detached: bool = False
    does_follow: bool = True
    is_sure: bool = False
    is_dry: bool = False
    is_json: bool = False


@dataclass(frozen=True)
class Request:
    """A spec to submit: as a mapping, with the folder that its paths are relative to, and the file it is from."""

    spec: dict[str, Any]
    workdir: Path | None
    source: SpecFile | None = None


def run(options: RunOptions) -> int:
    """The exit status of ``tidemill run``: the job's own, when it was followed to its end."""
    request = read_request(options)
    try:
        with Client(project=options.project) as client:
            if options.is_dry:
                from tidemill.cli.quoting import show_quote

                return show_quote(client.quote(request.spec), request.spec, is_json=options.is_json)
            if not options.is_sure and _is_worth_asking(options, request) and not _confirm(client, request):
                note("nothing was submitted")
                return 1
            _check_is_new(client, request)
            workload = submit(client, request, is_json=options.is_json)
            return after_submit(client, workload, options)
    except TidemillError as error:
        if request.source is None or not (error.field or error.data.get("errors")):
            raise
        show_error(error, lines=request.source.line_of, source=request.source.source)
        return error.kind.exit_status


def _check_is_new(client: Client, request: Request) -> None:
    """Raises: Conflict when it is a service of which one of that name runs: whoever means to update it says so."""
    if "service" not in request.spec and request.spec.get("kind") != "service":
        return
    name = str(request.spec.get("name", ""))
    if any(client.jobs(name=name, kind="service", state=",".join(_ACTIVE), limit=1)):
        file = request.source.source if request.source is not None else "FILE"
        raise Conflict(f"{name} runs already.", mend=f"tidemill update {file}, or --name for another one beside it.")


def read_request(options: RunOptions) -> Request:
    """The spec that a file and the flags make together. Raises: TidemillError for what cannot be read."""
    if options.file and options.command:
        raise InvalidRequest("give a FILE or -- COMMAND, not both")
    source: SpecFile | None = None
    if options.command:
        spec: dict[str, Any] = {"run": _line(options.command), "name": _name_of(options.command)}
    elif options.file:
        source = read_file(options.file, tool=options.tool, env=options.env).accepted()
        spec = dict(source.spec)
        spec.setdefault("name", _as_name(Path(options.file).resolve().stem))
    else:
        raise InvalidRequest("there is nothing to run", mend="tidemill run FILE, or tidemill run -- COMMAND")
    _apply_flags(spec, options)
    folder = spec.pop("workdir", None) if source is not None else None
    base = source.folder if source is not None else Path()
    if options.workdir is not None:
        base, folder = Path(), options.workdir
    return Request(spec, base / Path(folder).expanduser() if folder else None, source)


def read_file(file: str, *, tool: str | None = None, env: tuple[str, ...] = (), is_said: bool = True) -> Reading:
    """A workload file, whoever's it is; ``is_said`` tells people when it is not Tidemill's. Raises: TidemillError."""
    from tidemill.sdk import compat

    if tool is not None and tool not in [*compat.Tool]:
        names = ", ".join(compat.Tool)
        raise InvalidRequest(
            "is not a tool whose files are read", field="--from", value=tool, mend=f"Tools are {names}."
        )
    chosen = compat.Tool(tool) if tool is not None else None
    local = time.localtime()
    around = compat.Surroundings(
        source=file,
        given=dict(_variable(item) for item in env),
        environ=os.environ,
        now_ns=time.time_ns(),
        offset_s=local.tm_gmtoff,
    )
    if file == "-":
        octets = sys.stdin.buffer.read()
        reading = compat.parse(octets, source="standard input", folder=Path(), tool=chosen, surroundings=around)
    else:
        path = Path(file)
        if not path.exists() and not file.endswith((".yaml", ".yml")):
            raise InvalidRequest(f"there is no file {file}", mend=f"To run a command: tidemill run -- {file} …")
        reading = compat.load(path, tool=chosen, surroundings=around)
    if is_said and reading.translation is not None:
        note(f"{file} is read as {reading.title}; tidemill compat {file} shows what became of each field")
    elif is_said and reading.doubt:
        note(f"{file} is read as {reading.title}: {reading.doubt}; --from decides")
    return reading


def _apply_flags(spec: dict[str, Any], options: RunOptions) -> None:
    for name in _PLAIN_FLAGS:
        if (value := getattr(options, name)) is not None:
            spec[name] = value
    if options.nodes is not None:
        spec["nodes"] = _number_or(
            options.nodes, r"\d+\.\.\d+", "--nodes", "Write for example 4, or 2..8 for as many as fit."
        )
    if options.priority is not None:
        mend = "Write low, normal, high, or a number."
        spec["priority"] = _number_or(options.priority, r"low|normal|high", "--priority", mend)
    if options.is_spot:
        spec.pop("capacity", None)
        spec["spot"] = True
    if options.after:
        spec["after"] = list(options.after)
    if options.within is not None:
        spec["placement"] = {**_section(spec, "placement"), "within": options.within}
    said = {"sites": list(options.site), "countries": list(options.country), "weigh": options.weigh}
    if narrowed := {name: value for name, value in said.items() if value}:
        spec["placement"] = {**_section(spec, "placement"), **narrowed}
    given = {"gpus": options.gpus, "cpus": options.cpus, "memory": options.memory}
    if wanted := {name: value for name, value in given.items() if value is not None}:
        spec["resources"] = {**_section(spec, "resources"), **wanted}
    if options.env:
        spec["envs"] = {**_section(spec, "envs"), **dict(_variable(item) for item in options.env)}
    if options.secret:
        known = spec.get("secrets")
        spec["secrets"] = [*(known if isinstance(known, list) else ()), *options.secret]
    if options.model:
        spec["model"] = _mount("from", options.model)
    for field, key, mounts in (("data", "dataset", options.data), ("volumes", "name", options.volume)):
        if mounts:
            known = spec.get(field)
            spec[field] = [*(known if isinstance(known, list) else ()), *(_mount(key, one) for one in mounts)]
    if options.python or options.package:
        environment = _section(spec, "env")
        if options.python:
            environment["python"] = options.python
        if options.package:
            environment["packages"] = [*environment.get("packages", ()), *options.package]
        spec["env"] = environment
    if options.retry is not None:
        spec["retry"] = {"on": ["node_lost", "preempted", "error"], **_section(spec, "retry"), "max": options.retry}


def _mount(key: str, text: str) -> dict[str, str]:
    """``NAME`` or ``NAME=PATH`` as an entry of ``data`` or ``volumes``, or as ``model``."""
    name, equals, path = text.partition("=")
    return {key: name, "at": path} if equals else {key: name}


def _number_or(text: str, pattern: str, flag: str, mend: str) -> int | str:
    """A whole number, or a word of another pattern. Raises: InvalidRequest."""
    if re.fullmatch(r"-?\d{1,9}", text, re.ASCII):
        return int(text)
    if not re.fullmatch(pattern, text, re.ASCII):
        raise InvalidRequest("cannot be that", field=flag, value=text, mend=mend)
    return text


def _section(spec: dict[str, Any], name: str) -> dict[str, Any]:
    section = spec.get(name)
    return dict(section) if isinstance(section, dict) else {}


def _variable(text: str) -> tuple[str, str]:
    """``KEY=value``, or ``KEY`` for the value it has here. Raises: InvalidRequest when it has none."""
    name, equals, value = text.partition("=")
    if not equals and name not in os.environ:
        raise InvalidRequest(f"{name} is not set here", field="--env", value=text, mend=f"Write --env {name}=value.")
    return name, value if equals else os.environ[name]


def _line(command: tuple[str, ...]) -> str:
    """One word is a shell line as it is; several are quoted so that they arrive as they were given."""
    return command[0] if len(command) == 1 else shlex.join(command)


def _name_of(command: tuple[str, ...]) -> str:
    words = command[0].split() if len(command) == 1 else command
    script = next((word for word in words[1:] if word.endswith((".py", ".sh"))), words[0] if words else "run")
    return _as_name(Path(script).stem)


def _as_name(text: str) -> str:
    name = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in text)
    return name.strip("-_.")[:63].strip("-_.") or "run"


def _is_worth_asking(options: RunOptions, request: Request) -> bool:
    """Whether a person is there and the file asks for GPUs, which is where a mistake costs."""
    gpus = _section(request.spec, "resources").get("gpus")
    if options.is_json or not options.file or gpus in (None, 0, "0", "none", ""):
        return False
    return sys.stdin.isatty() and sys.stderr.isatty()


def _confirm(client: Client, request: Request) -> bool:
    from tidemill.cli.quoting import show_quote

    show_quote(client.quote(request.spec), request.spec, is_json=False)
    print("Submit? [Y/n] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("", "y", "yes")


def submit(client: Client, request: Request, *, is_json: bool = False) -> Workload:
    """The submitted workload; uploading its folder shows how far it is."""
    with Ticker(is_silent=is_json or not sys.stderr.isatty()) as ticker:

        def progress(done: int, total: int) -> None:
            ticker.say(f"packing {request.workdir}")
            ticker.amend(f"packing {request.workdir}  {format_size(done)} of {format_size(total)}")

        return client.submit(request.spec, workdir=request.workdir, progress=progress)


def after_submit(client: Client, workload: Workload, options: RunOptions) -> int:
    """What a run does once it is submitted: detach, wait for readiness, or follow it to its end."""
    if options.is_json and (options.is_detached or not options.does_follow):
        emit(workload.to_json())
        return 0
    if options.is_json:
        emit_line({"type": "submitted", "workload": workload.to_json()})
    job = workload.jobs[0]
    if options.is_detached or not options.does_follow:
        jobs = f", {count(len(workload.jobs), 'job')}" if len(workload.jobs) > 1 else ""
        say(f"{paint('submitted', 'green')} {workload.name}{jobs}  {paint(job.id, 'muted')}")
        note(f"  tidemill logs -f {workload.name}   tidemill why {workload.name}   tidemill stop {workload.name}")
        return 0
    if workload.kind in ("service", "dev"):
        return wait_until_ready(client, workload, is_json=options.is_json)
    if len(workload.jobs) > 1:
        return wait_for_all(client, workload, is_json=options.is_json)
    return follow(client, job, is_json=options.is_json, does_stop=True)


def follow(
    client: Client,
    job: Job,
    *,
    is_json: bool = False,
    does_stop: bool = False,
    rank: int | None = None,
    attempt: int | None = None,
    tail: int | None = None,
) -> int:
    """The exit status of a job whose log was shown to its end; 130 when Ctrl-C ended either."""
    printer = LogPrinter(is_json=is_json, is_prefixed=job.nodes > 1 and rank is None)
    ticker = Ticker(is_silent=is_json or not sys.stderr.isatty())
    with ticker, _Interrupts(client, job, ticker, does_stop) as keys:
        ticker.say(waiting_text(job))
        chunks = client.logs(
            job.id,
            rank=rank,
            attempt=attempt,
            tail=tail,
            on_retry=lambda error: ticker.say(f"{error.detail}; the job goes on, trying again"),
        )
        try:
            for part in chunks:
                if isinstance(part, LogChunk):
                    ticker.hide()
                    printer.write(part)
                    ticker.say("")
                else:
                    job = part.job
                    printer.update(part)
                    ticker.say(waiting_text(job))
        except KeyboardInterrupt:
            ticker.close()
            note(f"\n{job.name} goes on without this terminal: tidemill logs -f {job.name}, tidemill stop {job.name}")
            return INTERRUPTED
        finally:
            chunks.close()
            ticker.hide()
            printer.close()
    if not job.is_terminal:
        job = client.wait(job.id)
    if not is_json:
        _say_end(job)
    return INTERRUPTED if keys.was_pressed and job.state == "cancelled" else job.exit_status


def waiting_text(job: Job) -> str:
    """What a job is waiting for; empty while it runs."""
    if job.state == "queued":
        return f"{job.name} waits" + (f": {job.reason.sentence}" if job.reason and job.reason.sentence else "")
    if job.state == "starting":
        return f"{job.name} is being started" + (f" (attempt {job.attempts})" if job.attempts > 1 else "")
    if job.state == "stopping":
        return f"{job.name} is stopping"
    return ""


def _say_end(job: Job) -> None:
    took = format_duration(job.ended_at_ns - job.started_at_ns) if job.ended_at_ns and job.started_at_ns else ""
    after = f" after {took}" if took else ""
    if job.state == "succeeded":
        if sys.stderr.isatty():
            note(f"✓ {job.name} succeeded{after}", "green")
        return
    if job.state == "cancelled":
        note(f"■ {job.name} was stopped{after}", "yellow")
        return
    status = f" with exit code {job.exit_code}" if job.exit_code else ""
    why = job.detail or (job.cause.replace("_", " ") if job.cause not in ("", "error") else "")
    note(f"✗ {job.name} failed{status}{after}" + (f": {why}" if why else ""), "red")
    note(f"  tidemill why {job.id}")


class LogPrinter:
    """Log chunks on standard output: as they are, or line by line behind their rank, or as lines of JSON."""

    def __init__(self, *, is_json: bool = False, is_prefixed: bool = False) -> None:
        self._is_json = is_json
        self._is_prefixed = is_prefixed
        self._rest: dict[int, str] = {}
        self._attempt = 0

    def write(self, chunk: LogChunk) -> None:
        """Show a chunk."""
        if self._is_json:
            emit_line({"type": "log", **chunk.to_json()})
            return
        if self._attempt and chunk.attempt > self._attempt:
            self.close()
            note(f"— attempt {chunk.attempt} —")
        self._attempt = max(self._attempt, chunk.attempt)
        if not self._is_prefixed:
            sys.stdout.write(chunk.text)
        else:
            *lines, rest = (self._rest.get(chunk.rank, "") + chunk.text).split("\n")
            self._rest[chunk.rank] = rest
            for line in lines:
                self._line(chunk.rank, line)
        sys.stdout.flush()

    def update(self, update: JobUpdate) -> None:
        """Tell of a change of the job, where programs read."""
        if self._is_json:
            emit_line({"type": "job", **update.to_json()})

    def close(self) -> None:
        """Show what is left of unfinished lines; harmless twice."""
        for rank, rest in sorted(self._rest.items()):
            if rest:
                self._line(rank, rest)
        self._rest.clear()
        sys.stdout.flush()

    def _line(self, rank: int, line: str) -> None:
        colour = ("cyan", "blue", "green", "yellow")[rank % 4]
        sys.stdout.write(f"{paint(f'{rank} │', colour)} {line}\n")


class _Interrupts:
    """Ctrl-C while following: first stops the job (when it is ours to stop), then detaches.

    Stopping is asked for in another thread, so that the log being read loses nothing.
    """

    def __init__(self, client: Client, job: Job, ticker: Ticker, does_stop: bool) -> None:
        self.was_pressed = False
        self._client, self._job, self._ticker, self._does_stop = client, job, ticker, does_stop
        self._before: Any = None

    def __enter__(self) -> _Interrupts:
        if self._does_stop and threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._pressed)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _pressed(self, _number: int, _frame: FrameType | None) -> None:
        if self.was_pressed:
            raise KeyboardInterrupt
        self.was_pressed = True
        threading.Thread(target=self._stop, name="stop", daemon=True).start()

    def _stop(self) -> None:
        self._ticker.hide()
        note(f"stopping {self._job.name}; Ctrl-C again to leave it to itself", "yellow")
        try:
            self._client.stop(self._job.id)
        except TidemillError as error:
            show_error(error)


def wait_until_ready(client: Client, workload: Workload, *, is_json: bool = False) -> int:
    """0 once a job of the workload is ready; the job's exit status when all ended before."""
    job = workload.jobs[0]
    with Ticker(waiting_text(job), is_silent=is_json) as ticker:
        try:
            job = client.wait(
                job.id,
                until=lambda seen: bool(seen.endpoint) or (workload.kind == "dev" and seen.state == "running"),
                on_update=lambda seen: ticker.say(waiting_text(seen) or f"{seen.name} runs and gets ready"),
            )
        except KeyboardInterrupt:
            ticker.close()
            note(f"\n{workload.name} goes on without this terminal: tidemill stop {workload.name} ends it")
            return INTERRUPTED
    if is_json:
        emit_line({"type": "job", "job": job.to_json()})
    elif job.is_terminal:
        _say_end(job)
    else:
        where = f" at {job.endpoint}" if job.endpoint else ""
        say(f"{paint('ready', 'green')} {workload.name}{where}")
        hint = "tidemill attach" if workload.kind == "dev" else "tidemill logs -f"
        note(f"  {hint} {workload.name}   tidemill stop {workload.name}")
    return job.exit_status if job.is_terminal else 0


def wait_for_all(client: Client, workload: Workload, *, is_json: bool = False) -> int:
    """The exit status of the first job that failed, or 0, when all jobs of a workload ended."""
    with Ticker(is_silent=is_json) as ticker:
        try:
            while any(job.state in _ACTIVE for job in workload.jobs):
                ticker.say(f"{workload.name}: {_tally(workload.jobs)}")
                time.sleep(0.5)
                workload = replace(workload, jobs=tuple(client.jobs(workload=workload.id)))
        except KeyboardInterrupt:
            ticker.close()
            note(f"\n{workload.name} goes on without this terminal: tidemill stop {workload.name} ends it")
            return INTERRUPTED
    if is_json:
        emit_line({"type": "workload", "workload": workload.to_json()})
    else:
        say(f"{workload.name}: {_tally(workload.jobs)}")
    return next((job.exit_status for job in workload.jobs if job.state != "succeeded"), 0)


def _tally(jobs: Iterable[Job]) -> str:
    tally: dict[str, int] = {}
    for job in jobs:
        tally[job.state] = tally.get(job.state, 0) + 1
    return ", ".join(f"{number} {name}" for name, number in sorted(tally.items()))
