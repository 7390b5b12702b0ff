"""``model``: the registry of models, their versions, and which of them is meant by a stage or an alias."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Annotated

import typer

from tidemill.cli.output import age, clock, count, emit, facts, note, paint, say, table
from tidemill.cli.parsing import InProject, Json, group_of
from tidemill.cli.ticker import Ticker
from tidemill.errors import InvalidRequest
from tidemill.sdk.client import Client
from tidemill.sdk.results import LineageInfo, ModelInfo, ModelVersionInfo
from tidemill.units import format_size

_Name = Annotated[str, typer.Argument(metavar="NAME", help="Its name.")]
_Reference = Annotated[
    str, typer.Argument(metavar="NAME[:VERSION]", help="Or NAME:STAGE, NAME@ALIAS; the newest version unless given.")
]
_Why = Annotated[str, typer.Option("--why", metavar="TEXT", help="Kept with it, and in the event log.")]


def model_list(project: InProject = None, json: Json = False) -> None:
    """The project's models."""
    with Client(project=project) as client:
        models = client.models()
    if json:
        emit([model.to_json() for model in models])
    elif not models:
        say("no models")
    else:
        rows = [
            (
                one.name,
                str(one.newest or ""),
                str(one.production or ""),
                str(one.staging or ""),
                ", ".join(f"{alias.name}={alias.version}" for alias in one.aliases),
                age(one.changed_at_ns),
            )
            for one in models
        ]
        table(("name", "newest", "production", "staging", "aliases", "changed"), rows, flexible=4)


def model_show(reference: _Reference, project: InProject = None, json: Json = False) -> None:
    """All about a model, and about one of its versions: what it is, where it came from, what uses it."""
    with Client(project=project) as client:
        found = client.model_version(reference)
        model = client.model(found.name)
        versions = client.model_versions(found.name)
    if json:
        emit(found.to_json() | {"model": model.to_json()})
        return
    say(paint(found.reference, "bold") + (f"  {found.description}" if found.description else ""))
    facts([*_stage_facts(found), *_card_facts(found), *_lineage_facts(found.lineage), *_use_facts(found)])
    if others := [one for one in versions if one.version != found.version]:
        say("other versions:")
        table(("version", "stage", "aliases", "size", "job", "age"), [_row(one) for one in others])


def model_push(
    name: _Name,
    path: Annotated[str, typer.Argument(metavar="[PATH]", help="A file or folder; of the job with --job.")] = "",
    job: Annotated[str, typer.Option("--job", metavar="JOB", help="Take it from this job's output folder.")] = "",
    artifact: Annotated[str, typer.Option("--artifact", metavar="NAME[:VERSION]", help="Take this artifact.")] = "",
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Let pickles in, if the project's policy has it.")
    ] = False,
    describe: Annotated[str, typer.Option("--describe", metavar="TEXT", help="What is to be said of it.")] = "",
    metric: Annotated[
        list[str] | None, typer.Option("--metric", metavar="NAME=VALUE", help="What it reached; repeatable.")
    ] = None,
    tag: Annotated[list[str] | None, typer.Option("--tag", metavar="NAME=VALUE", help="Repeatable.")] = None,
    base_model: Annotated[str, typer.Option("--base-model", metavar="NAME", help="What it was made from.")] = "",
    licence: Annotated[str, typer.Option("--licence", metavar="NAME", help="Such as apache-2.0.")] = "",
    framework: Annotated[str, typer.Option("--framework", metavar="NAME", help="Such as pytorch.")] = "",
    commit: Annotated[str, typer.Option("--commit", metavar="SHA", help="The git commit that it was made from.")] = "",
    project: InProject = None,
    json: Json = False,
) -> None:
    """Add a version of a model: a folder of this machine, of a job's output, or an artifact. All files are looked at.

    Example: tidemill model push greeter ./checkpoint --metric loss=1.2
    """
    if not path and not job and not artifact:
        mend = f"tidemill model push {name} ./folder, or --job JOB, or --artifact NAME."
        raise InvalidRequest("it does not say what the version is", field="path", mend=mend)
    here = Path(path) if path and not job and not artifact else None
    with Client(project=project) as client, Ticker("looking at it", is_silent=json) as ticker:
        made = client.push_model(
            name,
            here,
            job=job,
            path=path if job else "",
            artifact=artifact,
            allow_pickles=allow_pickle,
            description=describe,
            metrics=_pairs(metric, "--metric"),
            tags=_pairs(tag, "--tag"),
            base_model=base_model,
            licence=licence,
            framework=framework,
            commit=commit or (_commit_of(here) if here else ""),
            progress=lambda done, total: ticker.amend(f"{format_size(done)} of {format_size(total)} sent"),
        )
    if json:
        emit(made.to_json())
        return
    say(f"{paint(made.reference, 'bold')}  {count(made.files, 'file')}, {format_size(made.size)}{_weights(made)}")
    if made.pickles:
        note(f"  {count(len(made.pickles), 'pickle')} let in by {made.pickles_allowed}")
    note(f"  in a spec: model: models:/{made.name}/{made.version}")


def model_pull(
    reference: _Reference,
    to: Annotated[str, typer.Argument(metavar="[FOLDER]", help="Where to; NAME here unless given.")] = "",
    project: InProject = None,
    json: Json = False,
) -> None:
    """Fetch the files of a version, each checked. What broke off goes on where it was."""
    with Client(project=project) as client, Ticker("fetching", is_silent=json) as ticker:
        found = client.model_version(reference)
        target = Path(to or found.name)
        written = client.pull_model(
            f"{found.name}:{found.version}",
            target,
            progress=lambda done, total: ticker.amend(f"{format_size(done)} of {format_size(total)}"),
        )
    if json:
        emit({"model": found.reference, "target": str(target), "files": [str(one) for one in written]})
    else:
        say(f"{found.reference}: {count(len(written), 'file')} in {target}")


def model_promote(
    reference: _Reference,
    stage: Annotated[str, typer.Option("--to", metavar="STAGE", help="staging, or production.")] = "production",
    why: _Why = "",
    project: InProject = None,
    json: Json = False,
) -> None:
    """Put a version into production, or into staging. The one that was there is archived.

    Services are given a version when they are submitted, and keep it until they are submitted anew.
    """
    if stage not in ("staging", "production"):
        mend = "Write staging or production; see also tidemill model archive and demote."
        raise InvalidRequest("that is no stage to promote to", field="--to", value=stage, mend=mend)
    with Client(project=project) as client:
        named = client.model_version(reference)
        before = client.model(named.name)
        after = client.promote_model(named.reference, stage, why=why)
    was = before.production if stage == "production" else before.staging
    _told(after, f"is in {stage}" + (f" instead of {was}" if was not in (0, after.version) else ""), json=json)


def model_archive(reference: _Reference, why: _Why = "", project: InProject = None, json: Json = False) -> None:
    """Put a version out of use. It is kept."""
    with Client(project=project) as client:
        after = client.promote_model(reference, "archived", why=why)
    _told(after, "is archived", json=json)


def model_demote(reference: _Reference, why: _Why = "", project: InProject = None, json: Json = False) -> None:
    """Take a version out of its stage."""
    with Client(project=project) as client:
        after = client.promote_model(reference, "none", why=why)
    _told(after, "is in no stage", json=json)


def model_alias(
    reference: _Reference,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="Such as champion.")],
    why: _Why = "",
    project: InProject = None,
    json: Json = False,
) -> None:
    """Have an alias point to a version, and to no other."""
    with Client(project=project) as client:
        after = client.alias_model(reference, alias, why=why)
    _told(after, f"is {after.name}@{alias}", json=json)


def model_unalias(
    name: _Name,
    alias: Annotated[str, typer.Argument(metavar="ALIAS", help="See tidemill model list.")],
    project: InProject = None,
    json: Json = False,
) -> None:
    """Take an alias away."""
    with Client(project=project) as client:
        after: ModelInfo = client.unalias_model(name, alias)
    if json:
        emit(after.to_json())
    else:
        say(f"{name} has no alias {alias}")


def model_delete(
    reference: _Reference,
    every: Annotated[bool, typer.Option("--all", help="The model with all its versions.")] = False,
    project: InProject = None,
    json: Json = False,
) -> None:
    """Delete a version, which has to be named, with its files. Its number is not given again.

    Refused while it is in staging or production, has an alias, or is used.
    """
    is_named = any(sign in reference.removeprefix("models:/") for sign in ":@/")
    if is_named == every:
        mend = f"Name a version, such as {reference.partition(':')[0]}:3; or all of them: --all."
        raise InvalidRequest("it does not say what to delete", field="model", value=reference, mend=mend)
    with Client(project=project) as client:
        if every:
            gone = client.delete_model(reference)
            shown, told = gone.to_json(), f"deleted {gone.name}, with all its versions"
        else:
            one = client.delete_model_version(reference)
            shown, told = one.to_json(), f"deleted {one.reference}"
    if json:
        emit(shown)
    else:
        say(told)


def model_policy(
    pickles: Annotated[
        str, typer.Option("--pickles", metavar="POLICY", help="allow or refuse: whether pickles may be let in.")
    ] = "",
    project: InProject = None,
    json: Json = False,
) -> None:
    """What the project lets into its models. Changing it is for administrators."""
    with Client(project=project) as client:
        policy = client.model_policy(pickles)
    if json:
        emit({"pickles": policy})
    elif policy == "allow":
        say("pickles are let in where whoever pushes asks for it: --allow-pickle")
    else:
        say("pickles are refused")


model_app = group_of(
    "Models in versions: what they are, where they came from, and which is in production.",
    list=model_list,
    show=model_show,
    push=model_push,
    pull=model_pull,
    promote=model_promote,
    archive=model_archive,
    demote=model_demote,
    alias=model_alias,
    unalias=model_unalias,
    delete=model_delete,
    policy=model_policy,
)


def _told(after: ModelVersionInfo, what: str, *, json: bool) -> None:
    if json:
        emit(after.to_json())
        return
    say(f"{paint(after.reference, 'bold')} {what}")


def _row(one: ModelVersionInfo) -> tuple[str, ...]:
    stage = "" if one.stage.stage == "none" else one.stage.stage
    size = format_size(one.size)
    return str(one.version), stage, ", ".join(one.aliases), size, one.lineage.job, age(one.created_at_ns)


def _stage_facts(found: ModelVersionInfo) -> list[tuple[str, str]]:
    told = [("created", f"{clock(found.created_at_ns)} by {found.created_by}")]
    if found.stage.stage != "none":
        why = f": {found.stage.why}" if found.stage.why else ""
        told.append(("stage", f"{found.stage.stage} since {clock(found.stage.since_at_ns)} by {found.stage.by}{why}"))
    if found.aliases:
        told.append(("aliases", ", ".join(found.aliases)))
    return told


def _card_facts(found: ModelVersionInfo) -> list[tuple[str, str]]:
    parameters = f"{found.parameters:,}" if found.parameters else ""
    shares = ", ".join(f"{count:,} in {kind}" for kind, count in found.precisions.items())
    rows = [
        ("format", found.format),
        ("framework", found.framework),
        ("architecture", found.architecture),
        ("base model", found.base_model),
        ("licence", found.licence),
        ("parameters", parameters + (f" ({shares})" if shares else "")),
        ("files", f"{found.files:,}, {format_size(found.size)}"),
        ("digest", found.digest),
        ("code", ", ".join(found.code)),
        ("pickles", f"{', '.join(found.pickles)}, let in by {found.pickles_allowed}" if found.pickles else ""),
        ("metrics", ", ".join(f"{name}={value}" for name, value in found.metrics.items())),
        ("tags", ", ".join(f"{name}={value}" for name, value in found.tags.items())),
    ]
    return [(name, value) for name, value in rows if value]


def _lineage_facts(lineage: LineageInfo) -> list[tuple[str, str]]:
    made = f"{lineage.job} ({lineage.workload}, spec {lineage.spec_digest[:12]})" if lineage.job else ""
    rows = [("made by", made), ("from", lineage.source), ("commit", lineage.commit), ("run", lineage.run)]
    for name, ancestors in (("data", lineage.data), ("artifacts", lineage.artifacts), ("models", lineage.models)):
        rows.append((name, ", ".join(f"{one.reference} ({one.digest[:12]})" for one in ancestors)))
    return [(name, value) for name, value in rows if value]


def _use_facts(found: ModelVersionInfo) -> list[tuple[str, str]]:
    rows = [
        ("used by", ", ".join(f"{one.name} ({one.kind})" for one in found.used_by)),
        ("copies on", ", ".join(found.cached_on)),
    ]
    return [(name, value) for name, value in rows if value]


def _weights(made: ModelVersionInfo) -> str:
    if not made.parameters:
        return f", {made.format}" if made.format else ""
    return f", {made.parameters:,} parameters in {made.precision}"


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    found = {}
    for item in given or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise InvalidRequest("is not NAME=VALUE", field=option, value=item, mend=f"{option} loss=1.2")
        found[name] = value
    return found


def _commit_of(path: Path) -> str:
    """The git commit that a path is checked out from; empty when it is in no repository, or git is not there."""
    folder = path if path.is_dir() else path.parent
    try:
        found = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""
