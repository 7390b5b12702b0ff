"""How the fleet is shared: ``queue``, ``share``, ``reserve``, and ``cordon``, ``drain``, ``resume``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tidemill.cli.output import clock, count, emit, note, paint, resources, say, show_error, state, table, until
from tidemill.cli.parsing import InProject, Json, group_of
from tidemill.cli.ticker import Ticker
from tidemill.errors import InvalidRequest, TidemillError
from tidemill.sdk.client import Client
from tidemill.sdk.results import NodeInfo, QueuedJob, ReservationInfo, Share
from tidemill.units import MILLI, format_duration, format_size

if TYPE_CHECKING:
    from tidemill.sdk.specfile import SpecFile

_Node = Annotated[str, typer.Argument(metavar="NODE", help="A machine's name or id; see tidemill nodes.")]
_Reason = Annotated[str, typer.Option("--reason", metavar="TEXT", help="Why, for those who wonder.")]


# --- the order of the queue ---


def queue_command(
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, max=10_000, help="At most so many.")] = 100,
    project: InProject = None,
    json: Json = False,
) -> None:
    """Waiting jobs, in the order in which they would be tried, and why each waits."""
    with Client(project=project) as client:
        jobs = client.queue(limit=limit)
    if json:
        emit([job.to_json() for job in jobs])
    elif not jobs:
        say("no job waits")
    else:
        headings = ("#", "name", "id", "project", "user", "asks for", "sites", "waited", "reason", "starts", "why")
        table(headings, [_queued_row(job) for job in jobs], flexible=10)


def _queued_row(job: QueuedJob) -> tuple[str, ...]:
    each = resources(job.resources)
    size = f"{job.nodes_min}..{job.nodes}" if job.nodes_min < job.nodes else str(job.nodes)
    asks = f"{size} × ({each})" if job.nodes > 1 else each
    return (
        str(job.position) if job.position else "–",
        job.name,
        job.job,
        job.project,
        job.user,
        f"{asks}, {job.capacity}" if job.capacity not in ("", "on_demand") else asks,
        ", ".join(job.sites),
        format_duration(job.waited_ns),
        job.reason.code if job.reason else "",
        f"{until(job.starts_by_at_ns)} at the latest" if job.starts_by_at_ns else "",
        job.reason.sentence if job.reason else "",
    )


# --- who has what ---


def _share(ctx: typer.Context, json: Json = False) -> None:
    """Who has what: a row for each queue and project, with what it holds, borrowed and could have."""
    if ctx.invoked_subcommand is not None:
        return
    with Client() as client:
        rows = client.share()
    if json:
        emit([row.to_json() for row in rows])
        return
    amounts = ("guaranteed", "limit", "held", "borrowed", "entitled")
    headings = ("queue", "project", "weight", *amounts, "share", "running", "waiting")
    table(headings, [_share_row(row) for row in rows], flexible=7)


def _share_row(row: Share) -> tuple[str, ...]:
    return (
        "  " * row.depth + row.name,
        row.project if row.project != row.name else "",
        f"{row.weight:g}",
        _amounts(row.guaranteed),
        _amounts(row.limit),
        _amounts(row.held),
        _amounts(row.borrowed),
        _amounts(row.entitled),
        f"{row.share:.1%}",
        str(row.running),
        str(row.queued),
    )


def _amounts(amounts: Mapping[str, int]) -> str:
    """``4 gpu, 2 H100, 64 cpu, 512 GB``: what is there, without what is zero."""
    words = []
    for name, amount in amounts.items():
        if amount:
            words.append(format_size(amount) if name == "memory" else f"{amount / MILLI:g} {name.removeprefix('gpu:')}")
    return ", ".join(words)


def share_apply(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A YAML file with queues: a list of them.")],
    json: Json = False,
) -> int:
    """Set the places of the quota tree that a file lists, all of them or none; others stay as they are."""
    from tidemill.sdk import specfile

    source = specfile.load(file)
    queues = source.spec.get("queues")
    if set(source.spec) != {"queues"} or not isinstance(queues, list):
        raise InvalidRequest(
            f"{file} is not a quota tree",
            field="queues",
            mend="Write queues: with a list of {name, parent, weight, …}.",
        )
    try:
        with Client() as client:
            found = client.set_queues(queues)
    except TidemillError as error:
        if not (error.field or error.data.get("errors")):
            raise
        show_error(error, lines=_line_finder(source, queues), source=str(file))
        return error.kind.exit_status
    if json:
        emit([queue.to_json() for queue in found])
    else:
        say(f"set {count(len(queues), 'queue')}; there are {len(found)}")
    return 0


def _line_finder(source: SpecFile, queues: list[Any]) -> Callable[[str], int]:
    """What finds the line of a field such as ``queues.vision.weight``, which names the queue instead of its number."""
    names = {str(queue.get("name")): at for at, queue in enumerate(queues) if isinstance(queue, dict)}

    def line_of(field: str) -> int:
        for name in sorted(names, key=len, reverse=True):
            if field == f"queues.{name}" or field.startswith(f"queues.{name}."):
                return source.line_of(f"queues.{names[name]}{field[len('queues.') + len(name) :]}")
        return source.line_of(field)

    return line_of


def share_set(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A queue's name; it is made when there is none.")],
    weight: Annotated[
        float | None, typer.Option("--weight", metavar="N", help="By which what is left is shared.")
    ] = None,
    guarantee: Annotated[
        list[str] | None,
        typer.Option("--guarantee", metavar="CLASS=N", help="Such as gpu=8 or gpu:H100=4; repeatable."),
    ] = None,
    limit: Annotated[
        list[str] | None, typer.Option("--limit", metavar="CLASS=N", help="Such as gpu=16 or memory=1TB; repeatable.")
    ] = None,
    parent: Annotated[
        str | None, typer.Option("--parent", metavar="NAME", help="The queue above; empty for none.")
    ] = None,
    project: Annotated[str | None, typer.Option("--project", metavar="NAME", help="Whose jobs wait in it.")] = None,
    max_running: Annotated[int | None, typer.Option("--max-running", metavar="N", min=0, help="0 for no cap.")] = None,
    max_queued: Annotated[int | None, typer.Option("--max-queued", metavar="N", min=0, help="0 for no cap.")] = None,
    json: Json = False,
) -> None:
    """Set one place of the quota tree; what is not given stays as it is. CLASS= takes an amount away.

    A new queue that has the name of a project which has none is that project's.
    """
    given: dict[str, Any] = {
        "weight": int(weight) if weight is not None and weight.is_integer() else weight,
        "parent": parent,
        "project": project,
        "max_running": max_running,
        "max_queued": max_queued,
    }
    changes = {field: value for field, value in given.items() if value is not None}
    with Client() as client:
        queues = client.queues()
        before = next((queue for queue in queues if queue.name == name), None)
        if before is None and project is None and all(queue.project != name for queue in queues):
            changes |= {"project": name} if any(one.name == name for one in client.projects()) else {}
        if guarantee:
            changes["guaranteed"] = _changed(before.guaranteed if before else {}, guarantee, "--guarantee")
        if limit:
            changes["limit"] = _changed(before.limit if before else {}, limit, "--limit")
        made = client.set_queue(name, **changes)
    if json:
        emit(made.to_json())
    else:
        whose = f", where the jobs of project {made.project} wait" if made.project else ""
        say(f"set {made.name}" if before else f"made {made.name}{whose}")
        note("  tidemill share")


def _changed(before: Mapping[str, Any], items: Iterable[str], field: str) -> dict[str, Any]:
    """Amounts by class after ``CLASS=N`` items were put over them."""
    found = dict(before)
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or not name:
            raise InvalidRequest(
                "is not an amount", field=field, value=item, mend="Write for example gpu=8 or memory=512GB."
            )
        found.pop(name, None)
        if text:
            found[name] = text if name == "memory" else _number(text, field, item)
    return found


def _number(text: str, field: str, item: str) -> int | float:
    try:
        number = float(text)
    except ValueError as error:
        raise InvalidRequest("is not a number", field=field, value=item, mend="Write for example gpu=8.") from error
    return int(number) if number.is_integer() else number


share_app = group_of("Who has what, and who should have how much.", apply=share_apply, set=share_set)
share_app.callback(invoke_without_command=True)(_share)
share_app.info.no_args_is_help = False


# --- times that are known before ---


def reserve_create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Workloads say it in reservation.")],
    start: Annotated[str, typer.Option("--start", metavar="TIME", help="now, 2h, or 2027-03-01T09:00:00Z.")],
    length: Annotated[str, typer.Option("--for", metavar="TIME", help="How long a window is open, such as 4h.")],
    nodes: Annotated[int | None, typer.Option("--nodes", metavar="N", min=1, help="How many machines.")] = None,
    node: Annotated[
        list[str] | None, typer.Option("--node", metavar="NODE", help="This machine, instead of a number; repeatable.")
    ] = None,
    gpus: Annotated[str, typer.Option("--gpus", metavar="GPUS", help="What each has at least, such as H100:8.")] = "",
    label: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="A label that each has; repeatable.")
    ] = None,
    every: Annotated[str, typer.Option("--every", metavar="TIME", help="It comes again after, such as 7d.")] = "",
    until: Annotated[str, typer.Option("--until", metavar="TIME", help="When it stops coming again.")] = "",
    maintenance: Annotated[bool, typer.Option("--maintenance", help="For nobody: nothing runs there then.")] = False,
    project: InProject = None,
    json: Json = False,
) -> None:
    """Keep machines for a project, or for nobody, at a time that is known before; once or again and again."""
    if (nodes is None) == (not node):
        raise InvalidRequest("give --nodes N, or --node for each machine", field="--nodes", value=nodes)
    labels = {}
    for item in label or ():
        key, equals, value = item.partition("=")
        if not equals:
            raise InvalidRequest("is not a label", field="--label", value=item, mend="Write --label zone=a.")
        labels[key] = value
    with Client(project=project) as client:
        made = client.reserve(
            name,
            start=start,
            duration=length,
            nodes=list(node or ()) if nodes is None else nodes,
            gpus=gpus,
            labels=labels,
            every=every,
            until=until,
            maintenance=maintenance,
        )
    if json:
        emit(made.to_json())
        return
    say(f"reserved {paint(made.name, 'bold')}: {', '.join(made.nodes)}")
    use = f"tidemill run --reservation {made.name} -- …" if made.project else "for nobody"
    note(f"  {_window(made)}   {use}")


def reserve_list(json: Json = False) -> None:
    """Reservations with a window to come, the earliest first."""
    with Client() as client:
        found = client.reservations()
    if json:
        emit([one.to_json() for one in found])
    elif not found:
        say("no reservations")
    else:
        rows = [
            (
                one.name,
                state(one.state),
                one.project or paint("maintenance", "muted"),
                _window(one),
                format_duration(one.every_ns) if one.every_ns else "",
                clock(one.until_at_ns),
                ", ".join(one.nodes),
            )
            for one in found
        ]
        table(("name", "state", "for", "window", "every", "until", "machines"), rows, flexible=6)


def _window(reservation: ReservationInfo) -> str:
    window = reservation.window or {"from_ns": reservation.starts_at_ns, "to_ns": reservation.ends_at_ns}
    length = format_duration(window["to_ns"] - window["from_ns"])
    return f"{clock(window['from_ns'])} for {length}"


def reserve_cancel(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Its name or id; see tidemill reserve list.")],
    json: Json = False,
) -> None:
    """Cancel a reservation with all its windows to come."""
    with Client() as client:
        found = client.cancel_reservation(name)
    if json:
        emit(found.to_json())
    else:
        say(f"cancelled {found.name}")


reserve_app = group_of(
    "Machines kept for a time that is known before.", create=reserve_create, list=reserve_list, cancel=reserve_cancel
)


# --- machines ---


def cordon_command(node: _Node, reason: _Reason = "", json: Json = False) -> None:
    """Place nothing new on a machine; what runs there goes on."""
    with Client() as client:
        found = client.cordon(node, reason)
    _marked(found, "nothing new is placed there", is_json=json)


def drain_command(
    node: _Node,
    reason: _Reason = "",
    wait: Annotated[bool, typer.Option("--wait", help="Return once nothing runs there.")] = False,
    json: Json = False,
) -> None:
    """Empty a machine: what runs there is stopped with its checkpoint grace and queues again."""
    with Client() as client:
        found = client.drain(node, reason)
        with Ticker(is_silent=json or not wait) as ticker:
            while wait and found.workers and found.marking == "drain":
                ticker.say(f"{found.name}: {count(found.workers, 'worker')} to go")
                time.sleep(0.2)
                found = next((one for one in client.nodes() if one.id == found.id), found)
    left = f"{count(found.workers, 'worker')} to go" if found.workers else "nothing runs there"
    _marked(found, left, is_json=json)


def resume_command(node: _Node, reason: _Reason = "", json: Json = False) -> None:
    """Open a machine to work again; what its devices were failing of is forgotten."""
    with Client() as client:
        found = client.resume(node, reason)
    _marked(found, "it takes work", is_json=json)


def _marked(node: NodeInfo, told: str, *, is_json: bool) -> None:
    if is_json:
        emit(node.to_json())
    else:
        say(f"{state(node.state)} {node.name}: {told}")
