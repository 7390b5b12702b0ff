"""What is managed by name: ``secret``, ``token``, ``project`` and ``artifact``, each with its commands."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from tidemill.cli.output import age, clock, count, emit, facts, note, paint, say, table
from tidemill.cli.parsing import InProject, Json, group_of
from tidemill.errors import InvalidRequest, NotFound
from tidemill.model.limits import limit_of
from tidemill.sdk.client import Client
from tidemill.sdk.results import TokenInfo
from tidemill.units import MILLI, format_size

_SecretName = Annotated[str, typer.Argument(metavar="NAME", help="Its name; jobs get a variable of that name.")]
_TokenId = Annotated[str, typer.Argument(metavar="ID", help="See tidemill token list; or its name.")]
_Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", metavar="NAME", help="What it may ask, * standing for anything; repeatable. All by default."
    ),
]
_Limits = Annotated[
    list[str] | None,
    typer.Option(
        "--limit", metavar="WHAT=N", help="Of requests to models, such as requests/minute=60, usd/month=50; repeatable."
    ),
]
_Priority = Annotated[
    str | None, typer.Option("--priority", metavar="BAND", help="high, normal or low: whose requests go first.")
]
_Label = Annotated[
    str | None, typer.Option("--label", metavar="TEXT", help="What its requests are booked under when they do not say.")
]
_Reference = Annotated[str, typer.Argument(metavar="NAME[:VERSION]", help="The newest version unless given.")]


# --- secrets ---


def secret_set(
    name: _SecretName,
    from_file: Annotated[Path | None, typer.Option("--from-file", metavar="FILE", help="Read it there.")] = None,
    project: InProject = None,
    json: Json = False,
) -> None:
    """Store a secret. The value is asked for, or read from standard input or a file: never from the command line."""
    if from_file is not None:
        value = from_file.read_text()
    elif sys.stdin.isatty():
        import getpass

        value = getpass.getpass(f"value of {name}: ")
    else:
        value = sys.stdin.read().removesuffix("\n")
    if not value:
        raise InvalidRequest("the value is empty", field=name)
    with Client(project=project) as client:
        client.put_secret(name, value)
    if json:
        emit({"name": name})
    else:
        say(f"stored {name}")
        note(f"  tidemill run --secret {name} -- …")


def secret_list(project: InProject = None, json: Json = False) -> None:
    """The names of the project's secrets; their values are shown to nobody."""
    with Client(project=project) as client:
        names = client.secrets()
    if json:
        emit(list(names))
    elif not names:
        say("no secrets")
    for name in () if json else names:
        say(name)


def secret_rm(name: _SecretName, project: InProject = None, json: Json = False) -> None:
    """Forget a secret."""
    with Client(project=project) as client:
        client.delete_secret(name)
    if json:
        emit({"name": name, "removed": True})
    else:
        say(f"removed {name}")


secret_app = group_of(
    "Values that jobs get as variables and nobody sees.", set=secret_set, list=secret_list, rm=secret_rm
)


# --- tokens ---


def token_create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What it is for.")],
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", metavar="SCOPE", help="read, submit, exec, infer, admin; repeatable."),
    ] = None,
    expires_in: Annotated[str, typer.Option("--expires-in", metavar="TIME", help="Such as 90d.")] = "",
    project: InProject = None,
    model: _Models = None,
    limit: _Limits = None,
    priority: _Priority = None,
    label: _Label = None,
    json: Json = False,
) -> None:
    """Make a token. It is shown this once."""
    scopes = [part for item in scope or ["read", "submit"] for part in item.split(",") if part]
    with Client() as client:
        made = client.create_token(
            name,
            scopes=scopes,
            project=project or "",
            expires_in=expires_in,
            models=model or (),
            limits=_limits_of(limit),
            priority=priority or "normal",
            label=label or "",
        )
    if json:
        emit(made.to_json())
        return
    say(made.token)
    until = f", until {clock(made.expires_at_ns)}" if made.expires_at_ns else ""
    note(f"shown this once; {', '.join(made.scopes or scopes)}{until}. Use it as TIDEMILL_TOKEN.")


def token_list(json: Json = False) -> None:
    """The tokens, without their secret part."""
    with Client() as client:
        tokens = client.tokens()
    if json:
        emit([token.to_json() for token in tokens])
        return
    rows = [
        (
            token.name,
            token.id,
            token.display,
            ",".join(token.scopes),
            token.project,
            paint("revoked", "red") if token.revoked_at_ns else clock(token.expires_at_ns) or "never",
        )
        for token in tokens
    ]
    table(("name", "id", "begins", "scopes", "project", "expires"), rows)


def token_show(token_id: _TokenId, json: Json = False) -> None:
    """All about one token: what it opens, what it may ask of models, and how much."""
    with Client() as client:
        _show_token(_token(client, token_id), json=json)


def token_set(
    token_id: _TokenId,
    model: _Models = None,
    limit: _Limits = None,
    priority: _Priority = None,
    label: _Label = None,
    json: Json = False,
) -> None:
    """Change which models a token may ask, how much, and when it is its turn. What is not named stays as it is."""
    with Client() as client:
        known = _token(client, token_id)
        limits = {**known.limits, **_limits_of(limit)}
        for name in [part.partition("=")[0] for part in limit or () if part.endswith("=")]:
            limits.pop(name, None)
        changed = client.change_token(
            known.id,
            models=None if model is None else [one for one in model if one],
            limits=limits,
            priority=priority,
            label=label,
        )
    _show_token(changed, json=json)


def _token(client: Client, token_id: str) -> TokenInfo:
    """The token of that id or name. Raises: NotFound."""
    known = client.tokens()
    found = [one for one in known if token_id == one.id] or [
        one for one in known if token_id == one.name and not one.revoked_at_ns
    ]
    if len(found) != 1:
        many = "Several tokens have that name." if found else "There is no such token."
        raise NotFound(many, field="token", value=token_id, mend="See tidemill token list.")
    return found[0]


def _show_token(token: TokenInfo, *, json: bool) -> None:
    if json:
        emit(token.to_json())
        return
    say(paint(token.name, "bold"))
    facts(
        [
            ("id", token.id),
            ("begins", token.display),
            ("scopes", ", ".join(token.scopes)),
            ("project", token.project or "all"),
            ("expires", clock(token.expires_at_ns) or "never"),
            *([("revoked", clock(token.revoked_at_ns))] if token.revoked_at_ns else []),
            ("models", ", ".join(token.models) or "all"),
            ("limits", _limits_text(token.limits) or "none"),
            ("priority", token.priority),
            *([("label", token.label)] if token.label else []),
        ]
    )


def _limits_text(limits: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:,.6f}".rstrip("0").rstrip(".") + f" {name}" for name, amount in limits.items())


def _limits_of(given: Sequence[str] | None) -> dict[str, float]:
    """The limits in texts such as ``requests/minute=60``, without those that have no amount. Raises: InvalidRequest."""
    found: dict[str, float] = {}
    for text in given or ():
        name, equals, amount = text.partition("=")
        try:
            if not equals:
                raise ValueError(f"{text!r} has no amount")
            if amount:
                limit = limit_of(name, float(amount) if "." in amount else int(amount))
                found[limit.name] = limit.written
        except ValueError as error:
            mend = "Write for example requests/minute=60, tokens/day=1000000 or usd/month=50."
            raise InvalidRequest(f"{error}.", field="limit", value=text, mend=mend) from error
    return found


def token_revoke(token_id: _TokenId, json: Json = False) -> None:
    """Make a token worthless, at once."""
    with Client() as client:
        client.revoke_token(token_id)
    if json:
        emit({"id": token_id, "revoked": True})
    else:
        say(f"revoked {token_id}")


token_app = group_of(
    "Credentials for people and programs.",
    create=token_create,
    list=token_list,
    show=token_show,
    set=token_set,
    revoke=token_revoke,
)


# --- projects ---


def project_create(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    gpus: Annotated[float, typer.Option("--gpus", metavar="N", min=0, help="At most so many held at a time.")] = 0,
    cpus: Annotated[float, typer.Option("--cpus", metavar="N", min=0, help="At most so many held at a time.")] = 0,
    limit: _Limits = None,
    country: Annotated[
        list[str] | None,
        typer.Option(
            "--country",
            metavar="NAME",
            help="Keep its work and its requests there, may be repeated; anywhere undoes it.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Make a project, or give one other limits; tidemill share set gives it a weight, a guarantee and more."""
    with Client() as client:
        made = client.create_project(
            name,
            limit_gpu_milli=round(gpus * MILLI),
            limit_cpu_milli=round(cpus * MILLI),
            limits=None if limit is None else _limits_of(limit),
            countries=None if not country else [name for name in country if name != "anywhere"],
        )
    if json:
        emit(made.to_json())
    else:
        say(f"created {made.name}{_kept(made.countries)}")
        note(f"  tidemill run --project {made.name} -- …")


def project_list(json: Json = False) -> None:
    """The projects and their limits."""
    with Client() as client:
        projects = client.projects()
    if json:
        emit([project.to_json() for project in projects])
        return
    rows = [
        (
            item.name,
            item.id,
            _limit(item.limit_gpu_milli),
            _limit(item.limit_cpu_milli),
            _limits_text(item.limits) or "none",
            ", ".join(item.countries) or "anywhere",
            age(item.created_at_ns),
        )
        for item in projects
    ]
    table(("name", "id", "gpu limit", "cpu limit", "requests to models", "countries", "age"), rows)


def _kept(countries: Sequence[str]) -> str:
    return f", kept in {', '.join(countries)}" if countries else ""


def _limit(milli: int) -> str:
    return f"{milli / MILLI:g}" if milli else "none"


project_app = group_of("Who shares a quota.", create=project_create, list=project_list)


# --- artifacts ---


def artifact_create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it.")],
    job: Annotated[str, typer.Option("--job", metavar="JOB", help="The job that made it.")],
    path: Annotated[str, typer.Option("--path", metavar="PATH", help="Where, in the job's output folder.")] = ".",
    project: InProject = None,
    json: Json = False,
) -> None:
    """Keep part of a job's output under a name, as its next version."""
    with Client(project=project) as client:
        made = client.create_artifact(name, job=job, path=path)
    if json:
        emit(made.to_json())
    else:
        say(f"created {paint(f'{made.name}:{made.version}', 'bold')}  {paint(format_size(made.size), 'muted')}")


def artifact_list(project: InProject = None, json: Json = False) -> None:
    """The project's artifacts, newest version first."""
    with Client(project=project) as client:
        artifacts = client.artifacts()
    if json:
        emit([artifact.to_json() for artifact in artifacts])
    elif not artifacts:
        say("no artifacts")
    else:
        rows = [
            (item.name, str(item.version), format_size(item.size), age(item.created_at_ns), item.job)
            for item in artifacts
        ]
        table(("name", "version", "size", "age", "job"), rows)


def artifact_show(reference: _Reference, project: InProject = None, json: Json = False) -> None:
    """All about one artifact."""
    with Client(project=project) as client:
        found = client.artifact(reference)
    if json:
        emit(found.to_json())
        return
    say(paint(f"{found.name}:{found.version}", "bold"))
    facts(
        [
            ("size", format_size(found.size)),
            ("sha256", found.digest),
            ("job", found.job),
            ("created", clock(found.created_at_ns)),
            *((name, str(value)) for name, value in found.metadata.items()),
        ]
    )


def artifact_get(
    reference: _Reference,
    folder: Annotated[Path | None, typer.Argument(metavar="FOLDER", help="By default one of its name.")] = None,
    project: InProject = None,
    json: Json = False,
) -> None:
    """Fetch an artifact's files into a folder."""
    target = folder or Path(reference.partition(":")[0])
    with Client(project=project) as client:
        written = client.get_artifact(reference, target)
    if json:
        emit({"reference": reference, "folder": str(target), "files": [str(path) for path in written]})
    else:
        say(f"wrote {count(len(written), 'file')} to {target}")


artifact_app = group_of(
    "Models and other results kept by name, in versions.",
    create=artifact_create,
    list=artifact_list,
    show=artifact_show,
    get=artifact_get,
)
