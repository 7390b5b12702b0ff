"""Where the command line starts: which command lives where, and how errors end.

Modules are imported when their command is asked for, so ``tidemill --help`` imports none of them, and
``tidemill run -- COMMAND`` does without the parser, whose import would take longer than all the rest.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from tidemill import __version__
from tidemill.cli.output import note, show_error
from tidemill.errors import TidemillError

INTERRUPTED = 130
_DEBUG_VARIABLE = "TIDEMILL_DEBUG"

COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "Start here": {
        "quickstart": ("quickstart", "Train a small model here, serve it, and see what it cost"),
        "up": ("cloud", "Start the cloud on this machine"),
        "down": ("cloud", "Stop it"),
        "status": ("cloud", "The state of the cloud"),
        "doctor": ("doctor", "What this machine offers, and how to get the rest"),
    },
    "Run work": {
        "run": ("work", "Run a workload file or a command"),
        "quote": ("work", "What a run would need, take and cost"),
        "chat": ("chat", "Talk with a model"),
        "stop": ("jobs", "Stop jobs, with their grace"),
        "compat": ("compat", "What becomes of a file written for another tool"),
        "schema": ("schema", "The JSON Schema of workload files"),
    },
    "Keep a service running": {
        "update": ("revising", "Bring a service that runs to a changed file"),
        "revisions": ("revising", "The revisions of a service, and its rollout"),
        "promote": ("revising", "Let a canary have more of the requests"),
        "abort": ("revising", "Take back what is being rolled out"),
        "rollback": ("revising", "Go back to an earlier revision"),
    },
    "Look at work": {
        "ps": ("jobs", "List jobs"),
        "show": ("jobs", "All about one job"),
        "why": ("jobs", "Why a job is where it is"),
        "logs": ("jobs", "A job's output"),
        "receipt": ("jobs", "What a job used and cost"),
        "usage": ("usage", "Tokens of models, and what a thousand took"),
        "guards": ("usage", "What guardrails decided about requests"),
        "queue": ("scheduling", "Waiting jobs, in their order"),
        "top": ("top", "Live view of machines and jobs"),
        "nodes": ("cloud", "The machines"),
    },
    "Inside a job": {
        "exec": ("inside", "Run a command in a worker"),
        "attach": ("inside", "Open a shell in a worker"),
        "cp": ("inside", "Copy files out of a job, or into it"),
    },
    "Share the machines": {
        "share": ("scheduling", "Who has what, and who should have how much"),
        "reserve": ("scheduling", "Machines kept for a time that is known before"),
        "cordon": ("scheduling", "Place nothing new on a machine"),
        "drain": ("scheduling", "Empty a machine"),
        "resume": ("scheduling", "Open a machine to work again"),
    },
    "Many machines": {
        "join": ("sites", "Make this machine part of a cloud"),
        "leave": ("sites", "Take this machine out of its cloud"),
        "site": ("sites", "The places where work runs"),
        "lost": ("sites", "Say that a silent machine is gone for good"),
    },
    "Try it out first": {
        "twin": ("twinning", "Run the scheduler on virtual time: what if?"),
        "record": ("twinning", "Save the turns that the scheduler takes"),
        "replay": ("twinning", "Take saved turns again, and see what changed"),
    },
    "Manage": {
        "artifact": ("access", "Results kept by name"),
        "model": ("models", "Models in versions, and which is in production"),
        "dataset": ("datasets", "Files that jobs read, known by content"),
        "volume": ("datasets", "Folders that jobs have mounted"),
        "secret": ("access", "Values that jobs get and nobody sees"),
        "token": ("access", "Credentials for people and programs"),
        "project": ("access", "Who shares a quota"),
    },
    "Keep it safe": {
        "backup": ("backups", "Write a verified backup, or check one"),
        "restore": ("backups", "Put a backup into an empty or stopped home"),
        "upgrade": ("upgrading", "Run the installed version in place of the one that runs"),
        "replicas": ("cloud", "The control planes that stand in for each other"),
        "strangers": ("backups", "What runs and is newer than the backup restored"),
    },
}
"""By heading, each command's module and what it does in a line."""


def main() -> None:
    """Run the command line and exit with its status."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """The exit status of the command line ``arguments``; errors are told on standard error."""
    debug = "--debug" in arguments[: arguments.index("--") if "--" in arguments else None]
    debug = debug or bool(os.environ.get(_DEBUG_VARIABLE))
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="replace")
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()
    except TidemillError as error:
        if debug:
            raise
        show_error(error)
        return error.kind.exit_status
    except KeyboardInterrupt:
        note("")
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has gone: nothing is wrong, and nothing more can be said
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except Exception as error:
        if debug:
            raise
        show_error(TidemillError(f"{type(error).__name__}: {error}", mend="This is a bug; --debug shows where."))
        return TidemillError.kind.exit_status
    return status


def _dispatch(arguments: list[str]) -> int:
    if arguments[:2] == ["run", "--"] and len(arguments) > 2 and "_TIDEMILL_COMPLETE" not in os.environ:
        from tidemill.cli import running

        project = os.environ.get("TIDEMILL_PROJECT")
        return running.run(running.RunOptions(command=tuple(arguments[2:]), project=project))
    from tidemill.cli import parsing

    return parsing.parse_and_run(arguments)


def version() -> str:
    """What ``--version`` says."""
    return f"tidemill {__version__}"


def find(name: str) -> tuple[str, str] | None:
    """A command's module and line of help."""
    return next((commands[name] for commands in COMMANDS.values() if name in commands), None)


def names() -> list[str]:
    """All commands, in the order of the help."""
    return [name for commands in COMMANDS.values() for name in commands]


def status_of(value: Any) -> int:
    """The exit status that a command returned; a command that returns nothing succeeded."""
    return value if isinstance(value, int) else 0


if __name__ == "__main__":
    main()
