"""``volume`` and ``dataset``: where work finds its files."""

from __future__ import annotations

from typing import Annotated

import typer

from tidemill.cli.output import age, clock, count, emit, facts, note, paint, say, table
from tidemill.cli.parsing import InProject, Json, group_of
from tidemill.cli.ticker import Ticker
from tidemill.errors import Conflict
from tidemill.sdk.client import Client
from tidemill.sdk.results import DataSetInfo, VolumeInfo
from tidemill.units import format_size

_Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]
_Reference = Annotated[str, typer.Argument(metavar="NAME[:VERSION]", help="The newest version unless given.")]
_Site = Annotated[str, typer.Option("--site", metavar="SITE", help="The site that has it; this one unless given.")]
_Node = Annotated[
    str, typer.Option("--machine", metavar="NAME", help="The one machine that has it; all of the site unless given.")
]


# --- volumes ---


def volume_create(
    name: _Name,
    path: Annotated[str, typer.Argument(metavar="PATH", help="The folder, on the site's machines.")],
    site: _Site = "",
    machine: _Node = "",
    read_only: Annotated[bool, typer.Option("--read-only", help="Jobs may only read it.")] = False,
    project: InProject = None,
    json: Json = False,
) -> None:
    """Give a folder of a site a name, by which jobs have it mounted."""
    with Client(project=project) as client:
        made = client.create_volume(name, path, site=site, node=machine, read_only=read_only)
    if json:
        emit(made.to_json())
    else:
        say(f"{paint(made.name, 'bold')} is {made.path} at {_place(made)}")
        note(f"  in a spec: volumes: [{{name: {made.name}, at: /volumes/{made.name}}}]")


def volume_list(project: InProject = None, json: Json = False) -> None:
    """The project's volumes."""
    with Client(project=project) as client:
        volumes = client.volumes()
    if json:
        emit([volume.to_json() for volume in volumes])
    elif not volumes:
        say("no volumes")
    else:
        rows = [
            (one.name, _place(one), one.path, "read only" if one.read_only else "", age(one.created_at_ns))
            for one in volumes
        ]
        table(("name", "site", "path", "", "age"), rows, flexible=2)


def volume_show(name: _Name, project: InProject = None, json: Json = False) -> None:
    """All about one volume."""
    with Client(project=project) as client:
        found = client.volume(name)
    if json:
        emit(found.to_json())
        return
    say(paint(found.name, "bold"))
    facts(
        [
            ("site", _place(found)),
            ("path", found.path),
            ("may be", "read" if found.read_only else "read and written"),
            ("created", f"{clock(found.created_at_ns)} by {found.created_by}"),
        ]
    )


def volume_delete(name: _Name, project: InProject = None, json: Json = False) -> None:
    """Take a volume's name away. Its files stay."""
    with Client(project=project) as client:
        gone = client.delete_volume(name)
    if json:
        emit(gone.to_json())
    else:
        say(f"{gone.name} is no volume any more; {gone.path} stays as it is")


volume_app = group_of(
    "Folders that jobs have mounted, to read and to write.",
    create=volume_create,
    list=volume_list,
    show=volume_show,
    delete=volume_delete,
)


# --- data sets ---


def dataset_add(
    name: _Name,
    home: Annotated[str, typer.Argument(metavar="HOME", help="A folder of this machine, or s3://bucket/prefix.")],
    site: _Site = "",
    machine: _Node = "",
    endpoint: Annotated[str, typer.Option("--endpoint", metavar="URL", help="Which S3; Amazon's unless given.")] = "",
    region: Annotated[str, typer.Option("--region", metavar="REGION", help="Of S3.")] = "",
    secret: Annotated[
        str,
        typer.Option("--secret", metavar="NAME", help="A secret with KEY_ID:SECRET_KEY; none if public."),
    ] = "",
    project: InProject = None,
    json: Json = False,
) -> None:
    """Add a version of a data set. All its files are read once, so that they are known by content."""
    with Client(project=project) as client, Ticker("reading", is_silent=json) as ticker:
        added = client.add_dataset(
            name,
            home,
            site=site,
            node=machine,
            endpoint=endpoint,
            region=region,
            secret=secret,
            progress=lambda done, total: ticker.amend(f"{format_size(done)} of {format_size(total)} read"),
        )
        found = client.await_dataset(_reference(added), told=lambda it: ticker.amend(it.detail or "reading"))
    if json:
        emit(found.to_json())
    if found.state == "failed":
        mend = f"Mend that, and have it read again: tidemill dataset verify {_reference(found)}."
        raise Conflict(f"{_reference(found)} could not be read: {found.detail}", field="home", value=home, mend=mend)
    if not json:
        say(f"{paint(_reference(found), 'bold')}  {count(found.files, 'file')}, {format_size(found.size)}")
        note(f"  in a spec: data: [{{dataset: {found.name}, at: /data/{found.name}}}]")


def dataset_list(project: InProject = None, json: Json = False) -> None:
    """The project's data sets, newest version first."""
    with Client(project=project) as client:
        datasets = client.datasets()
    if json:
        emit([dataset.to_json() for dataset in datasets])
    elif not datasets:
        say("no data sets")
    else:
        rows = [
            (one.name, str(one.version), one.state, f"{one.files:,}", format_size(one.size), one.home, _place(one))
            for one in datasets
        ]
        table(("name", "version", "state", "files", "size", "home", "site"), rows, flexible=5)


def dataset_show(reference: _Reference, project: InProject = None, json: Json = False) -> None:
    """All about one data set."""
    with Client(project=project) as client:
        found = client.dataset(reference)
    if json:
        emit(found.to_json())
        return
    say(paint(_reference(found), "bold"))
    facts(
        [
            ("state", found.state),
            *([("", found.detail)] if found.detail else []),
            ("home", found.home + (f" at {found.endpoint}" if found.endpoint else "")),
            *([("site", _place(found))] if found.site else []),
            *([("secret", found.secret)] if found.secret else []),
            ("files", f"{found.files:,}"),
            ("size", format_size(found.size)),
            ("manifest", found.digest),
            *([("copies on", ", ".join(found.cached_on))] if found.cached_on else []),
            ("created", f"{clock(found.created_at_ns)} by {found.created_by}"),
        ]
    )


def dataset_delete(reference: _Reference, project: InProject = None, json: Json = False) -> None:
    """Delete a version of a data set. Its files stay where they are."""
    with Client(project=project) as client:
        gone = client.delete_dataset(reference)
    if json:
        emit(gone.to_json())
    else:
        say(f"deleted {_reference(gone)}; {gone.home} stays as it is")


def dataset_verify(reference: _Reference, project: InProject = None, json: Json = False) -> None:
    """Read all files again: are they what they were? A folder is read on this machine."""
    with Client(project=project) as client, Ticker("reading", is_silent=json) as ticker:
        told = client.verify_dataset(
            reference, progress=lambda done, total: ticker.amend(f"{format_size(done)} of {format_size(total)} read")
        )
        found = client.dataset(reference)
    if json:
        emit({"dataset": _reference(found), "same": not told, "detail": told})
    if told:
        mend = "Add it anew, as its next version: tidemill dataset add."
        raise Conflict(told, field="dataset", value=_reference(found), mend=mend)
    if not json:
        say(f"{_reference(found)} is as it was: {count(found.files, 'file')}, {format_size(found.size)}")


def _reference(found: DataSetInfo) -> str:
    return f"{found.name}:{found.version}"


def _place(found: VolumeInfo | DataSetInfo) -> str:
    return f"{found.site}/{found.node}" if found.node else found.site


dataset_app = group_of(
    "Files that jobs read, known by content, in versions.",
    add=dataset_add,
    list=dataset_list,
    show=dataset_show,
    delete=dataset_delete,
    verify=dataset_verify,
)
