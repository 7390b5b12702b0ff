"""``tidemill run`` and ``tidemill quote``."""

from __future__ import annotations

from typing import Annotated

import typer

from tidemill.cli.parsing import InProject, Json, after_dashes
from tidemill.cli.running import RunOptions, run

_File = Annotated[
    str | None,
    typer.Argument(metavar="FILE", help="A workload file, of ours or of another tool; - for standard input."),
]
_From = Annotated[
    str | None,
    typer.Option("--from", metavar="TOOL", help="Whose file it is: skypilot, dstack, slurm or tidemill."),
]
_Gpus = Annotated[str | None, typer.Option("--gpus", metavar="GPUS", help="Of each worker: H100:8, 24GB+, 0.5, none.")]
_Cpus = Annotated[float | None, typer.Option("--cpus", metavar="N", help="Cores for each worker.")]
_Memory = Annotated[str | None, typer.Option("--memory", metavar="SIZE", help="For each worker, such as 16GB.")]
_Nodes = Annotated[
    str | None, typer.Option("--nodes", metavar="N", help="Workers that start together; 2..8 is elastic.")
]
_Name = Annotated[str | None, typer.Option("--name", metavar="NAME", help="What to call it.")]
_Env = Annotated[list[str] | None, typer.Option("--env", "-e", metavar="KEY=VALUE", help="Set a variable; repeatable.")]
_Secret = Annotated[list[str] | None, typer.Option("--secret", metavar="NAME", help="Give it a secret; repeatable.")]
_Data = Annotated[
    list[str] | None, typer.Option("--data", metavar="NAME[=PATH]", help="Give it a data set there; repeatable.")
]
_Model = Annotated[
    str | None, typer.Option("--model", metavar="MODEL[=PATH]", help="Give it a model there: NAME, NAME:3, NAME@ALIAS.")
]
_Volume = Annotated[
    list[str] | None, typer.Option("--volume", metavar="NAME[=PATH]", help="Give it a volume there; repeatable.")
]
_Python = Annotated[str | None, typer.Option("--python", metavar="VERSION", help="Python version of its environment.")]
_With = Annotated[
    list[str] | None, typer.Option("--with", metavar="PACKAGE", help="Install it for the job; repeatable.")
]
_Workdir = Annotated[str | None, typer.Option("--workdir", metavar="FOLDER", help="Folder to take along.")]
_Priority = Annotated[
    str | None, typer.Option("--priority", metavar="N", help="low, normal, high, or from -1000 to 1000.")
]
_Duration = Annotated[str | None, typer.Option("--max-duration", metavar="TIME", help="Stop it after, such as 30m.")]
_Expected = Annotated[
    str | None, typer.Option("--expected-duration", metavar="TIME", help="How long it should take; ends nothing.")
]
_StartAfter = Annotated[
    str | None, typer.Option("--start-after", metavar="TIME", help="Not before: 2h, or 2027-03-01T09:00:00Z.")
]
_StartBefore = Annotated[
    str | None, typer.Option("--start-before", metavar="TIME", help="Given up when it has not started by then.")
]
_After = Annotated[
    list[str] | None, typer.Option("--after", metavar="WORKLOAD", help="Once that one ended well; repeatable.")
]
_Spot = Annotated[bool, typer.Option("--spot", help="It may have to give way at any time.")]
_Reservation = Annotated[str | None, typer.Option("--reservation", metavar="NAME", help="Run in this reservation.")]
_Within = Annotated[
    str | None, typer.Option("--within", metavar="LEVEL", help="All workers in one site, block, rack, host or nvlink.")
]
_Site = Annotated[list[str] | None, typer.Option("--site", metavar="NAME", help="Only there; repeatable.")]
_Country = Annotated[
    list[str] | None, typer.Option("--country", metavar="XXX", help="Only at sites in it, or in the EU; repeatable.")
]
_Weigh = Annotated[
    str | None, typer.Option("--weigh", metavar="WHAT", help="Which site: by price, carbon, start or latency.")
]
_Retry = Annotated[int | None, typer.Option("--retry", metavar="N", help="Try again so often when it fails.")]


def run_command(
    ctx: typer.Context,
    file: _File = None,
    tool: _From = None,
    gpus: _Gpus = None,
    cpus: _Cpus = None,
    memory: _Memory = None,
    nodes: _Nodes = None,
    name: _Name = None,
    env: _Env = None,
    secret: _Secret = None,
    data: _Data = None,
    model: _Model = None,
    volume: _Volume = None,
    python: _Python = None,
    with_: _With = None,
    workdir: _Workdir = None,
    priority: _Priority = None,
    project: InProject = None,
    max_duration: _Duration = None,
    expected_duration: _Expected = None,
    start_after: _StartAfter = None,
    start_before: _StartBefore = None,
    after: _After = None,
    spot: _Spot = False,
    reservation: _Reservation = None,
    within: _Within = None,
    site: _Site = None,
    country: _Country = None,
    weigh: _Weigh = None,
    retry: _Retry = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once it is submitted.")] = False,
    follow: Annotated[bool, typer.Option("--follow/--no-follow", help="Show its output until it ends.")] = True,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before using GPUs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only quote it.")] = False,
    json: Json = False,
) -> int:
    """Run a workload file, or a command given after --.

    Shows the output until it ends, and exits with its exit code. Ctrl-C stops the job;
    Ctrl-C again leaves it to itself.

    Examples: tidemill run train.yaml; tidemill run --gpus 24GB+ -- python train.py
    """
    return run(
        RunOptions(
            file=file or "",
            tool=tool,
            command=after_dashes(ctx),
            gpus=gpus,
            cpus=cpus,
            memory=memory,
            nodes=nodes,
            name=name,
            env=tuple(env or ()),
            secret=tuple(secret or ()),
            data=tuple(data or ()),
            model=model,
            volume=tuple(volume or ()),
            python=python,
            package=tuple(with_ or ()),
            workdir=workdir,
            priority=priority,
            project=project,
            max_duration=max_duration,
            expected_duration=expected_duration,
            start_after=start_after,
            start_before=start_before,
            after=tuple(after or ()),
            is_spot=spot,
            reservation=reservation,
            within=within,
            site=tuple(site or ()),
            country=tuple(country or ()),
            weigh=weigh,
            retry=retry,
            is_detached=detach,
            does_follow=follow,
            is_sure=yes,
            is_dry=dry_run,
            is_json=json,
        )
    )


def quote_command(
    ctx: typer.Context,
    file: _File = None,
    tool: _From = None,
    gpus: _Gpus = None,
    cpus: _Cpus = None,
    memory: _Memory = None,
    nodes: _Nodes = None,
    data: _Data = None,
    model: _Model = None,
    volume: _Volume = None,
    max_duration: _Duration = None,
    spot: _Spot = False,
    within: _Within = None,
    site: _Site = None,
    country: _Country = None,
    weigh: _Weigh = None,
    project: InProject = None,
    json: Json = False,
) -> int:
    """What a run would need, when and where it would start, and what it would cost. Submits nothing."""
    return run(
        RunOptions(
            file=file or "",
            tool=tool,
            command=after_dashes(ctx),
            gpus=gpus,
            cpus=cpus,
            memory=memory,
            nodes=nodes,
            data=tuple(data or ()),
            model=model,
            volume=tuple(volume or ()),
            max_duration=max_duration,
            is_spot=spot,
            within=within,
            site=tuple(site or ()),
            country=tuple(country or ()),
            weigh=weigh,
            project=project,
            is_dry=True,
            is_json=json,
        )
    )
