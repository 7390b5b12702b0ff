"""Inside a job: ``exec``, ``attach``, ``cp``."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidemill.cli.output import count, emit, note, say
from tidemill.cli.parsing import InProject, JobRef, Json, Rank, after_dashes
from tidemill.cli.ticker import Ticker
from tidemill.errors import InvalidRequest, TidemillError, Unavailable
from tidemill.sdk.client import Client

if TYPE_CHECKING:
    from tidemill.sdk.execs import ExecSession

_SHELL = ("sh", "-c", "command -v bash >/dev/null 2>&1 && exec bash -i || exec sh -i")


def exec_command(
    ctx: typer.Context,
    job: JobRef,
    rank: Rank = 0,
    interactive: Annotated[bool, typer.Option("--interactive", "-i", help="Pass on standard input.")] = False,
    tty: Annotated[bool, typer.Option("--tty", "-t", help="Give the command a terminal.")] = False,
    project: InProject = None,
    json: Json = False,
) -> int:
    """Run a command in a worker, beside what runs there; exits with its exit code.

    Example: tidemill exec train -- nvidia-smi
    """
    command = after_dashes(ctx)
    if not command:
        raise InvalidRequest("there is no command", mend=f"tidemill exec {job} -- COMMAND")
    with Client(project=project) as client:
        if json:
            result = client.exec(job, command, rank=rank)
            out, err = (octets.decode("utf-8", "replace") for octets in (result.stdout, result.stderr))
            emit({"exit_code": result.exit_code, "stdout": out, "stderr": err})
            return result.exit_code
        if tty:
            return _terminal_session(client, job, command, rank)
        with client.exec_session(job, command, rank=rank) as session:
            session.feed(_standard_input() if interactive else ())
            return _pass_on(session)


def attach_command(job: JobRef, rank: Rank = 0, project: InProject = None) -> int:
    """Open a shell in a worker. Leaving it does not disturb what runs there."""
    with Client(project=project) as client:
        return _terminal_session(client, job, _SHELL, rank)


def cp_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="JOB:PATH, or a path here.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A path here, or JOB:PATH.")],
    rank: Rank = 0,
    project: InProject = None,
    json: Json = False,
) -> None:
    """Copy files out of a job, or into one that runs.

    JOB:model is in the job's output folder, which is there also after it ended;
    JOB:./x is in a running worker's working folder, JOB:/x is absolute in it.
    """
    from_job, to_job = _remote(source), _remote(target)
    if bool(from_job) == bool(to_job):
        raise InvalidRequest("one of the two is JOB:PATH, the other a path here", mend="tidemill cp JOB:model .")
    with Client(project=project) as client, Ticker(f"copying {source}", is_silent=json):
        if from_job:
            written = client.copy_from(*from_job, to=target, rank=rank)
        elif to_job:
            client.copy_to(to_job[0], source, to_job[1], rank=rank)
            written = [Path(source)]
    if json:
        emit({"source": source, "target": target, "files": [str(path) for path in written]})
    elif from_job:
        say(f"wrote {count(len(written), 'file')} to {target}")
    else:
        say(f"copied {source} to {target}")


def _remote(text: str) -> tuple[str, str] | None:
    """The job and the path of ``JOB:PATH``; None for a path here, which ``./a:b`` is even with a colon."""
    job, colon, path = text.partition(":")
    return (job, path) if colon and job and "/" not in job and job != "." else None


def _standard_input() -> Iterator[bytes]:
    while piece := os.read(sys.stdin.fileno(), 32_768):
        yield piece


def _pass_on(session: ExecSession) -> int:
    for kind, octets in session:
        stream = sys.stdout.buffer if kind == b"o" else sys.stderr.buffer
        stream.write(octets)
        stream.flush()
    return session.exit_code or 0


def _terminal_session(client: Client, job: str, command: tuple[str, ...], rank: int) -> int:
    """A command with a terminal of its own, which this terminal shows.

    Raises: InvalidRequest when this is not a terminal.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InvalidRequest("this needs a terminal", mend=f"Without one: tidemill exec {job} -- COMMAND")
    size = shutil.get_terminal_size()
    env = {"TERM": os.environ.get("TERM", "xterm-256color")}
    session = client.exec_session(job, command, rank=rank, tty=True, rows=size.lines, cols=size.columns, env=env)
    with session, _raw_terminal(), _resizes(session):
        threading.Thread(target=_type_on, args=(session,), name="keys", daemon=True).start()
        try:
            status = _pass_on(session)
        except Unavailable as error:
            note(f"\r\n{error.detail}\r")
            return error.kind.exit_status
    return status


def _type_on(session: ExecSession) -> None:
    with contextlib.suppress(OSError, TidemillError):
        while True:
            select.select([sys.stdin], [], [])
            piece = os.read(sys.stdin.fileno(), 4096)
            if not piece:
                session.end_input()
                return
            session.write(piece)


@contextlib.contextmanager
def _raw_terminal() -> Iterator[None]:
    """Give every key to the other side, Ctrl-C included."""
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _resizes(session: ExecSession) -> Iterator[None]:
    def resized(_number: int, _frame: Any) -> None:
        size = shutil.get_terminal_size()
        with contextlib.suppress(TidemillError):
            session.resize(size.lines, size.columns)

    before = signal.signal(signal.SIGWINCH, resized)
    try:
        yield
    finally:
        signal.signal(signal.SIGWINCH, before)
