"""The parser: a Typer group whose commands are imported when they are asked for, and what options share."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from tidemill.cli import main
from tidemill.cli.output import paint, say
from tidemill.errors import ErrorKind, TidemillError

AFTER_DASHES = "tidemill.after_dashes"
TAKE_COMMANDS = frozenset(("run", "quote", "exec"))
HELP_NAMES = {"help_option_names": ["-h", "--help"]}


def complete_job(incomplete: str) -> list[str]:
    """Names and ids of jobs that begin like this; nothing when the cloud does not answer at once."""
    from tidemill.sdk.client import Client

    try:
        with Client(retry_for_s=0) as client:
            jobs = list(client.jobs(limit=100))
    except TidemillError:
        return []
    known = dict.fromkeys([*(job.name for job in jobs), *(job.id for job in jobs)])
    return [name for name in known if name.startswith(incomplete)]


Json = Annotated[bool, typer.Option("--json", help="Machine output: JSON, without colours.")]
InProject = Annotated[
    str | None, typer.Option("--project", metavar="NAME", envvar="TIDEMILL_PROJECT", help="Act in this project.")
]
JobRef = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        help="A job's id or its beginning, or a workload's name (its newest job).",
        autocompletion=complete_job,
        show_default=False,
    ),
]
Rank = Annotated[int, typer.Option("--rank", metavar="N", min=0, help="Which worker of the job.")]


class PlainCommand(TyperCommand):
    """A command whose help names what an argument is, not the type that a program would call it by."""

    def get_help(self, ctx: Any) -> str:
        """The help, without ``<list[str]>`` and the like."""
        text: str = super().get_help(ctx)
        blank = re.sub(r" <[a-z]+(\[[a-z]+\])?>", lambda found: " " * len(found[0]), text)
        return "\n".join(line.rstrip() for line in blank.splitlines())


class DashCommand(PlainCommand):
    """A command that takes everything after ``--`` as it is; find it with ``after_dashes``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Keep what comes after the first ``--`` away from the parser."""
        if "--" in args:
            where = args.index("--")
            ctx.meta[AFTER_DASHES] = tuple(args[where + 1 :])
            args = args[:where]
        return super().parse_args(ctx, args)


def after_dashes(ctx: typer.Context) -> tuple[str, ...]:
    """What came after ``--``."""
    found: tuple[str, ...] = ctx.meta.get(AFTER_DASHES, ())
    return found


class LazyGroup(TyperGroup):
    """The group of all commands, each made when it is asked for."""

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, in the order of the help."""
        del ctx
        return main.names()

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name; None when there is none."""
        del ctx
        found = main.find(cmd_name)
        if found is None:
            return None
        module = importlib.import_module(f"tidemill.cli.{found[0]}")
        made: Callable[..., Any] | typer.Typer = getattr(module, f"{cmd_name}_app", None) or getattr(
            module, f"{cmd_name}_command"
        )
        return command_of(cmd_name, made)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command, its name and its arguments; an unknown name is answered with the nearest ones."""
        if args and main.find(args[0]) is None and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], main.names(), 2)
            hint = f" Did you mean {' or '.join(near)}?" if near else " See tidemill --help."
            ctx.fail(f"there is no command {args[0]!r}.{hint}")
        return super().resolve_command(ctx, args)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """All commands under their headings."""
        del ctx, formatter
        say(f"{paint('Tidemill', 'bold')}: one GPU cloud out of any machines with GPUs\n")
        say(f"{paint('Usage:', 'bold')} tidemill COMMAND …\n")
        left = max(map(len, (*main.names(), *(name for name, _ in _ROOT_OPTIONS))))
        for heading, commands in main.COMMANDS.items():
            say(paint(heading, "bold"))
            for name, (_, line) in commands.items():
                say(f"  {paint(name.ljust(left), 'cyan')}  {paint(line, 'muted')}")
            say()
        say(paint("Options", "bold"))
        for name, line in _ROOT_OPTIONS:
            say(f"  {paint(name.ljust(left), 'cyan')}  {paint(line, 'muted')}")
        say(f"\n{paint('tidemill COMMAND --help explains a command.', 'muted')}")


_ROOT_OPTIONS = (
    ("--version", "Show the version"),
    ("--debug", "Show where an error comes from (also TIDEMILL_DEBUG=1)"),
    ("--install-completion", "Complete names in this shell"),
    ("--help", "Show this"),
)


def command_of(name: str, made: Callable[..., Any] | typer.Typer) -> Any:
    """The parser's command for a function or a group of functions."""
    if isinstance(made, typer.Typer):
        group = get_command(made)
        group.name = name
        return group
    app = typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=HELP_NAMES)
    cls = DashCommand if name in TAKE_COMMANDS else PlainCommand
    app.command(name, cls=cls, context_settings=HELP_NAMES)(made)
    return get_command(app)


def group_of(help_text: str, **commands: Callable[..., Any]) -> typer.Typer:
    """A group such as ``tidemill secret``, with its commands."""
    app = typer.Typer(
        help=help_text, add_completion=False, rich_markup_mode=None, no_args_is_help=True, context_settings=HELP_NAMES
    )
    app.callback()(lambda: None)
    for name, function in commands.items():
        app.command(name.rstrip("_"), cls=PlainCommand, context_settings=HELP_NAMES)(function)
    return app


def root() -> Any:
    """The parser of the whole command line."""
    app = typer.Typer(
        cls=LazyGroup,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings=HELP_NAMES,
        invoke_without_command=True,
    )

    @app.callback(invoke_without_command=True)
    def start(
        ctx: typer.Context,
        version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
        debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
    ) -> None:
        """One GPU cloud out of any machines with GPUs."""
        del debug  # looked at before parsing, so that it holds for errors of the parser too
        if version:
            say(main.version())
        elif ctx.invoked_subcommand is None:
            ctx.get_help()

    return get_command(app)


def parse_and_run(arguments: list[str]) -> int:
    """The exit status of the command that ``arguments`` ask for. Raises: what the command raises."""
    usage_error: Any = typer.BadParameter.__mro__[2]
    try:
        return main.status_of(root().main(args=arguments, prog_name="tidemill", standalone_mode=False))
    except typer.Abort:
        return main.INTERRUPTED
    except usage_error as error:
        context = getattr(error, "ctx", None)
        message = error.format_message() if hasattr(error, "format_message") else str(error)
        if not message or type(error).__name__ == "NoArgsIsHelpError":
            say(context.get_help() if context is not None else "")
            return ErrorKind.INVALID.exit_status
        print(f"{paint('error:', 'red', sys.stderr)} {message[0].lower()}{message[1:]}", file=sys.stderr)
        if context is not None:
            print(f"  {paint(f'{context.command_path} --help', 'cyan', sys.stderr)} explains it", file=sys.stderr)
        return ErrorKind.INVALID.exit_status
