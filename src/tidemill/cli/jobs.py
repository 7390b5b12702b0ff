"""Looking at jobs and stopping them: ``ps``, ``show``, ``why``, ``logs``, ``receipt``, ``stop``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

import typer

from tidemill.cli.output import age, clock, count, emit, facts, note, paint, resources, say, state, table, until
from tidemill.cli.parsing import InProject, JobRef, Json, complete_job
from tidemill.cli.running import LogPrinter, follow
from tidemill.errors import InvalidRequest, TidemillError
from tidemill.sdk.client import Client
from tidemill.sdk.results import Forecast, Job, LogChunk, Replicas
from tidemill.units import format_duration

ACTIVE = "queued,starting,running,stopping"
_RECENT = 10


def ps_command(
    everything: Annotated[bool, typer.Option("--all", "-a", help="Also all jobs that ended.")] = False,
    states: Annotated[str, typer.Option("--state", metavar="STATES", help="Such as queued,running.")] = "",
    kind: Annotated[str, typer.Option("--kind", metavar="KIND", help="Only task, array, dev or service.")] = "",
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="Only names that begin like this.")] = "",
    limit: Annotated[int, typer.Option("--limit", metavar="N", min=1, help="At most so many.")] = 1000,
    project: InProject = None,
    json: Json = False,
) -> None:
    """List jobs: those not ended, and the latest that ended."""
    with Client(project=project) as client:
        if states or everything:
            jobs = list(client.jobs(state=states, kind=kind, name=name, limit=limit))
        else:
            found = list(client.jobs(state=ACTIVE, kind=kind, name=name, limit=limit))
            known = {job.id for job in found}
            recent = client.jobs(kind=kind, name=name, limit=min(limit, _RECENT))
            jobs = [*found, *(job for job in recent if job.id not in known)][:limit]
    if json:
        emit([job.to_json() for job in jobs])
    elif not jobs:
        say(f"no jobs yet; try: {paint('tidemill run -- echo hello', 'cyan')}")
    else:
        rows = [
            (job.name, job.id, job.kind, state(job.state), brief(job), age(job.submitted_at_ns), _size(job))
            for job in jobs
        ]
        table(("name", "id", "kind", "state", "why", "age", "resources"), rows, flexible=4)


def brief(job: Job) -> str:
    """In a few words why a job is in its state."""
    if job.state in ("queued", "starting"):
        return job.reason.sentence if job.reason else ""
    if job.state == "failed":
        return f"exit code {job.exit_code}" if job.exit_code and job.cause in ("", "error") else _words(job.cause)
    return _words(job.cause) if job.state == "stopping" else job.endpoint


def _words(cause: str) -> str:
    return cause.replace("_", " ")


def _size(job: Job) -> str:
    each = resources(job.resources)
    nodes = f"{job.nodes_min}..{job.nodes}" if 0 < job.nodes_min < job.nodes else str(job.nodes)
    return f"{nodes} × ({each})" if job.nodes > 1 and each else each


def show_command(job: JobRef, project: InProject = None, json: Json = False) -> None:
    """All about one job: its state, its workers, where they are and what they have."""
    with Client(project=project) as client:
        found = client.job(job)
        models = client.job_models(found.id)
    if json:
        emit(found.to_json() | {"models": [one.to_json() for one in models]})
        return
    say(f"{paint(found.name, 'bold')}  {state(found.state)}  {paint(found.id, 'muted')}")
    ended = found.ended_at_ns
    ran = (ended or 0) - found.started_at_ns if ended and found.started_at_ns else 0
    facts(
        [
            ("kind", found.kind),
            ("project", found.project),
            ("resources", _size(found)),
            ("waits for", found.reason.sentence if found.reason else ""),
            ("cause", " ".join(filter(None, (_words(found.cause), found.detail)))),
            ("exit code", "" if found.exit_code is None else str(found.exit_code)),
            ("submitted", clock(found.submitted_at_ns)),
            ("started", clock(found.started_at_ns)),
            ("ended", clock(ended) + (f"  after {format_duration(ran)}" if ran else "")),
            ("attempts", str(found.attempts) if found.attempts > 1 else ""),
            ("priority", str(found.priority) if found.priority else ""),
            ("capacity", found.capacity if found.capacity != "on_demand" else ""),
            ("displaced", count(found.evictions, "time") if found.evictions else ""),
            ("endpoint", found.endpoint),
            ("made", ", ".join(one.reference for one in models)),
            ("labels", ", ".join(f"{name}={value}" for name, value in found.labels.items())),
        ]
    )
    if found.workers:
        say()
        rows = [
            (
                str(worker.rank),
                worker.node,
                state(worker.state),
                _devices(worker.devices),
                f"{worker.cpu_milli / 1000:g}",
                "" if worker.exit_code is None else str(worker.exit_code),
                " ".join(worker.isolation),
            )
            for worker in found.workers
        ]
        table(("rank", "node", "state", "devices", "cpu", "exit", "isolation"), rows, flexible=6)
    if found.replicas is not None:
        say()
        _show_replicas(found.replicas)
    told = [(f"rank {one.rank}", _by_scheduler(one.scheduler)) for one in found.workers if one.scheduler]
    if told:
        say()
        facts(told)


def _show_replicas(found: Replicas) -> None:
    """How many replicas a service has, and which objective asked for how many."""
    there = [f"{found.ready} ready", f"{found.coming} coming" if found.coming else ""]
    there.append(f"{found.leaving} leaving" if found.leaving else "")
    known = "gone by" if found.has_pattern else "nothing to go by yet"
    facts(
        [
            ("replicas", f"{found.wanted} wanted of {found.least}..{found.most}: {', '.join(filter(None, there))}"),
            ("because", found.why),
            ("start", f"in about {format_duration(found.lead_ns)}" if found.lead_ns else ""),
            ("daily pattern", f"{count(found.days, 'day')}, {known}" if found.days else ""),
        ]
    )
    table(
        ("  objective", "asks for", "is at", "meant"),
        [(f"  {ask.objective}", str(ask.wants), ask.seen, ask.target) for ask in found.asks],
    )


def _by_scheduler(said: Mapping[str, str]) -> str:
    """How a worker ended, by the words of its site's scheduler."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in said.items())


def _devices(devices: tuple[object, ...]) -> str:
    return ", ".join(str(item.get("id", item)) if isinstance(item, dict) else str(item) for item in devices)


def why_command(job: JobRef, project: InProject = None, json: Json = False) -> None:
    """Why a job waits, or why it ended as it did."""
    with Client(project=project) as client:
        answer = client.why(job)
    if json:
        emit(answer.to_json())
        return
    say(f"{paint(job, 'bold')}  {state(answer.state)}  {paint(answer.job, 'muted')}")
    sentences = {reason.sentence for reason in answer.reasons}
    for line in answer.lines:
        if line not in sentences:
            say(f"  {line}")
    facts([("at", answer.site)])
    if answer.replicas is not None:
        _show_replicas(answer.replicas)
    for reason in answer.reasons:
        say(f"  {paint('•', 'yellow')} {reason.sentence}")
        amounts = [
            ("needed", reason.needed),
            ("available", reason.available),
            ("resolved by", reason.resolvable_by),
            ("code", reason.code),
        ]
        facts(amounts, indent=4)
    if answer.holdings:
        say(f"  {paint('held by', 'muted')}")
        rows = [
            (one.name or "another's job", one.job, one.project, one.amount, clock(one.ends_at_ns) or "not known")
            for one in answer.holdings
        ]
        table(("    job", "id", "project", "holds", "until"), [(f"    {row[0]}", *row[1:]) for row in rows])
    if answer.sites:
        from tidemill.cli.quoting import show_sites

        show_sites(answer.sites)
    place = [("place in the queue", f"{answer.position}, {answer.ahead} ahead" if answer.position else "")]
    facts([*place, *forecast_rows(answer.forecast)])


def forecast_rows(forecast: Forecast | None) -> list[tuple[str, str]]:
    """When a waiting job would start, in words, and what that rests on."""
    if forecast is None:
        return []
    if not forecast.likely_at_ns:
        soonest = f"; not before {until(forecast.earliest_at_ns)}" if forecast.earliest_at_ns else ""
        return [("starts", f"not within what can be foreseen{soonest}"), ("because", forecast.basis)]
    last = until(forecast.latest_at_ns) if forecast.latest_at_ns else "not foreseeable"
    between = f"{until(forecast.earliest_at_ns)} at the earliest, {last} at the latest"
    return [("starts", f"likely {until(forecast.likely_at_ns)}: {between}"), ("because", forecast.basis)]


def logs_command(
    job: JobRef,
    follow_: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends.")] = False,
    rank: Annotated[int | None, typer.Option("--rank", metavar="N", min=0, help="Only this worker.")] = None,
    tail: Annotated[int | None, typer.Option("--tail", metavar="N", min=0, help="Only the last so many lines.")] = None,
    attempt: Annotated[int | None, typer.Option("--attempt", metavar="N", min=1, help="Of this attempt.")] = None,
    project: InProject = None,
    json: Json = False,
) -> int:
    """A job's output. With several workers, each line has its worker's rank before it."""
    with Client(project=project) as client:
        found = client.job(job)
        if follow_ and not found.is_terminal:
            return follow(client, found, is_json=json, rank=rank, attempt=attempt, tail=tail)
        printer = LogPrinter(is_json=json, is_prefixed=found.nodes > 1 and rank is None)
        chunks = client.logs(found.id, rank=rank, attempt=attempt, tail=tail, follow=False)
        try:
            for part in chunks:
                if isinstance(part, LogChunk):
                    printer.write(part)
        finally:
            chunks.close()
            printer.close()
    return 0


def receipt_command(job: JobRef, project: InProject = None, json: Json = False) -> None:
    """What a job used and what that costs: time, money, energy, carbon."""
    from tidemill.cli.quoting import show_receipt

    with Client(project=project) as client:
        receipt = client.receipt(job)
    if json:
        emit(receipt.to_json())
    else:
        show_receipt(receipt)


def stop_command(
    jobs: Annotated[
        list[str] | None,
        typer.Argument(metavar="JOB…", help="Jobs or workloads.", autocompletion=complete_job, show_default=False),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All jobs that have not ended.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return once they are gone.")] = False,
    project: InProject = None,
    json: Json = False,
) -> int:
    """Stop jobs: they are asked to end, and killed after their grace. A workload's name stops all its jobs."""
    if bool(jobs) == everything:
        raise InvalidRequest("name the jobs to stop, or give --all")
    stopped: list[Job] = []
    status = 0
    with Client(project=project) as client:
        for ref in jobs or [job.id for job in list(client.jobs(state=ACTIVE))]:
            try:
                stopped += _stop(client, ref)
            except TidemillError as error:
                if not jobs or len(jobs) == 1:
                    raise
                note(f"{ref}: {error}", "red")
                status = error.kind.exit_status
        if wait:
            stopped = [replace(client.wait(job.id)) for job in stopped]
    if json:
        emit([job.to_json() for job in stopped])
    else:
        for job in stopped:
            say(f"{state(job.state)} {job.name}  {paint(job.id, 'muted')}")
        if not stopped and everything:
            say(count(0, "job") + " to stop")
    return status


def _stop(client: Client, ref: str) -> list[Job]:
    """A job's id stops that job, a name all jobs of the newest workload of that name."""
    if ref.startswith("job_"):
        return [client.stop(ref)]
    found = client.job(ref)
    if found.name != ref or not found.workload_id:
        return [client.stop(found.id)]
    return list(client.stop_workload(ref).jobs)
