"""The cloud itself: ``up``, ``down``, ``status``, ``nodes``."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from tidemill.cli.output import clock, count, emit, facts, note, paint, say, state, table
from tidemill.cli.parsing import Json
from tidemill.cli.ticker import Ticker
from tidemill.errors import InvalidRequest
from tidemill.sdk import connection
from tidemill.sdk.client import Client
from tidemill.sdk.results import NodeInfo, Status
from tidemill.units import MILLI, format_size

NO_GPU = "no GPU found: jobs run on CPU slots"
_JOINING_S = 20
HOW_TO_JOIN = "tidemill site token local   says how a machine joins"


def up_command(
    foreground: Annotated[bool, typer.Option("--foreground", "-f", help="Stay in this terminal.")] = False,
    port: Annotated[int | None, typer.Option("--port", metavar="N", help="Of the API; 7070 unless set.")] = None,
    gateway_port: Annotated[
        int | None, typer.Option("--gateway-port", metavar="N", help="Of the OpenAI address; 7071 unless set.")
    ] = None,
    gateway_workers: Annotated[
        int | None, typer.Option("--gateway-workers", metavar="N", help="Processes that answer there; 1 unless set.")
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", metavar="ADDRESS", help="To listen on; 0.0.0.0 for other machines.")
    ] = None,
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="ENGINE", help="local; ray for several machines; none.")
    ] = None,
    database: Annotated[
        str | None, typer.Option("--database", metavar="URL", help="PostgreSQL, instead of the file in the home.")
    ] = None,
    shared: Annotated[
        str | None, typer.Option("--shared", metavar="FOLDER", help="With control planes that stand in for each other.")
    ] = None,
    address: Annotated[
        str | None, typer.Option("--address", metavar="ADDRESS", help="Where other machines reach this one.")
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option("--tls-cert", metavar="FILE", help="PEM: what the API shows to other machines.")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", metavar="FILE", help="PEM: its key.")] = None,
    json: Json = False,
) -> None:
    """Start the cloud on this machine, or say that it runs already."""
    from tidemill import bootstrap

    home = connection.home()
    overrides = {
        "host": host, "port": port, "gateway_port": gateway_port,
        "gateway_workers": gateway_workers, "engine": engine, "database": database,
        "shared": str(Path(shared).expanduser().resolve()) if shared else None, "address": address,
        "tls_cert": str(tls_cert.expanduser().absolute()) if tls_cert else None,
        "tls_key": str(tls_key.expanduser().absolute()) if tls_key else None,
    }  # fmt: skip
    given = {name: value for name, value in overrides.items() if value is not None}
    if foreground:
        with Ticker("starting; Ctrl-C stops it") as ticker:
            bootstrap.run_foreground(home, given, ready=ticker.close)
        return
    is_new = not bootstrap.is_running(home)
    if not is_new and given:
        raise InvalidRequest(
            f"the cloud in {home} runs already, with other settings perhaps", mend="Stop it first: tidemill down"
        )
    with Ticker("starting the cloud", is_silent=json):
        endpoint = bootstrap.start_daemon(home, given) if is_new else bootstrap.read_endpoint(home)
        with Client(str(endpoint["api_url"]), _own_token(home), retry_for_s=20) as client:
            nodes = _machines(client, wait_s=_JOINING_S if is_new else 0)
            status = client.status()
    if json:
        emit({**endpoint, "home": str(home), "started": is_new, "status": status.to_json()})
        return
    say(paint("Tidemill is up" if is_new else "Tidemill is up already", "green"))
    facts(
        [
            ("API", str(endpoint["api_url"])),
            ("OpenAI", f"{endpoint.get('gateway_url') or status.gateway_url}/v1"),
            *machine_rows(nodes, status),
            ("token", f"{home / 'admin.token'}  {paint('an administrator; keep it to yourself', 'muted')}"),
        ]
    )
    note("  tidemill run -- echo hello   tidemill quickstart   tidemill doctor" if nodes else f"  {HOW_TO_JOIN}")


def _machines(client: Client, *, wait_s: float) -> tuple[NodeInfo, ...]:
    """The machines that there are. With Ray this one joins as any other does, which is waited for."""
    deadline = time.monotonic() + wait_s
    while True:
        nodes = client.nodes()
        is_joining = all(node.state in ("lost", "silent") for node in nodes)
        if not is_joining or time.monotonic() >= deadline or not any(site.outposts for site in client.sites()):
            return nodes
        time.sleep(0.1)


def _own_token(home: Path) -> str | None:
    path = home / "admin.token"
    return path.read_text().strip() if path.exists() else None


def machine_rows(nodes: tuple[NodeInfo, ...], status: Status) -> list[tuple[str, str]]:
    """What there is to run on, as names and values."""
    if not nodes:
        return [("machines", paint("none has joined yet", "yellow"))]
    devices = Counter(str(device.get("model", "GPU")) for node in nodes for device in node.devices)
    listed = ", ".join(f"{number} × {model}" for model, number in devices.items())
    memory = sum(node.memory_bytes for node in nodes)
    size = f"{status.cpu_milli / MILLI:g} CPU" + (f", {format_size(memory)}" if memory else "")
    return [("GPUs", listed or paint(NO_GPU, "yellow")), ("machines", f"{len(nodes)}  {paint(size, 'muted')}")]


def down_command(
    keep_jobs: Annotated[bool, typer.Option("--keep-jobs", help="Let jobs run on; the next up adopts them.")] = False,
    timeout: Annotated[float, typer.Option("--timeout", metavar="S", help="For the jobs to end, in seconds.")] = 60.0,
    json: Json = False,
) -> None:
    """Stop the cloud. Jobs are asked to end, and killed after their grace, unless --keep-jobs.

    While some are not over it stays up: they are named, and the exit status is 5.
    """
    from tidemill import bootstrap

    home = connection.home()
    text = "stopping the cloud; jobs run on" if keep_jobs else "stopping jobs, then the cloud"
    with Ticker(text if bootstrap.is_running(home) else "", is_silent=json):
        was_running = bootstrap.stop_daemon(home, stop_jobs=not keep_jobs, timeout_s=timeout)
    if json:
        emit({"was_running": was_running, "kept_jobs": keep_jobs, "home": str(home)})
    elif not was_running:
        say(f"no cloud runs in {home}")
    else:
        kept = "; its jobs run on, and tidemill up adopts them" if keep_jobs else ""
        say(f"Tidemill is down{kept}")


def status_command(json: Json = False) -> None:
    """The state of the cloud: its machines, what is free, how many jobs are in which state."""
    with Client() as client:
        status, nodes = client.status(), client.nodes()
    if json:
        emit(status.to_json())
        return
    say(f"{paint('Tidemill', 'bold')} {status.version}  {state(status.state)}  {paint(client.url, 'muted')}".rstrip())
    jobs = ", ".join(f"{number} {name}" for name, number in status.jobs.items() if number)
    free = f"{status.free_cpu_milli / MILLI:g} of {status.cpu_milli / MILLI:g} CPU"
    if status.gpu_milli:
        free = f"{status.free_gpu_milli / MILLI:g} of {status.gpu_milli / MILLI:g} GPU, {free}"
    facts(
        [
            *machine_rows(nodes, status),
            ("free", free),
            ("jobs", jobs or "none"),
            ("strangers", _strangers(status.strangers)),
            ("energy", status.energy),
            ("OpenAI", f"{status.gateway_url}/v1" if status.gateway_url else ""),
            ("home", str(connection.home()) if client.is_local and not os.environ.get("TIDEMILL_API_URL") else ""),
        ]
    )


def replicas_command(json: Json = False) -> None:
    """The control planes that stand in for each other: which leads, and whether the others are there."""
    with Client() as client:
        found = client.replicas()
    if json:
        emit([one.to_json() for one in found])
    elif not found:
        say("one control plane; several share a database and a folder: tidemill up --shared FOLDER")
    else:
        rows = [
            (one.api_url, "leads" if one.leads else "stands by", f"{one.quiet_ms / 1000:.1f} s ago") for one in found
        ]
        table(("address", "role", "heard of"), rows)


def _strangers(number: int) -> str:
    """What to say of launches that the database has never heard of; empty when there are none."""
    return paint(f"{number} unknown here: tidemill strangers list", "yellow") if number else ""


def nodes_command(json: Json = False) -> None:
    """The machines and what of them is free."""
    with Client() as client:
        nodes = client.nodes()
    if json:
        emit([node.to_json() for node in nodes])
        return
    if not nodes:
        say("no machine has joined yet")
        note(f"  {HOW_TO_JOIN}")
        return
    headings = ("name", "state", "gpus", "cpu", "memory", "processor", "where", "labels", "taints", "trouble")
    has_sites = len({node.site for node in nodes}) > 1
    table(headings, [(*node_row(node), *_node_notes(node, has_sites)) for node in nodes], flexible=9)
    if not any(node.devices for node in nodes):
        note(NO_GPU)


def _node_notes(node: NodeInfo, has_sites: bool) -> tuple[str, str, str, str]:
    """Where it stands, its labels and taints, and what is wrong with it."""
    where = "/".join(filter(None, (node.site if has_sites or node.block or node.rack else "", node.block, node.rack)))
    failing = [f"{item.get('device')} fails: {item.get('detail')}" for item in node.failing]
    held = (
        f"held back until {clock(node.held_until_at_ns)}" if node.state == "suspect" and node.held_until_at_ns else ""
    )
    others = [count(node.others_gpus, "GPU")] if node.others_gpus else []
    others += [f"{node.others_cpu_milli / 1_000:g} CPUs"] if node.others_cpu_milli else []
    if others:
        failing.append(f"others hold {', '.join(others)}")
    return (
        where,
        ", ".join(f"{name}={value}" for name, value in node.labels.items()),
        ", ".join(node.taints),
        "; ".join(filter(None, (node.state_cause, held, *failing))),
    )


def node_row(node: NodeInfo) -> tuple[str, ...]:
    """A machine as a row of a table."""
    models = Counter(_device(device) for device in node.devices)
    return (
        node.name,
        state(node.state),
        ", ".join(f"{number} × {model}" for model, number in models.items()),
        _part(node.free_cpu_milli / MILLI, node.cpu_milli / MILLI),
        format_size(node.memory_bytes),
        node.cpu_model,
    )


def _device(device: Mapping[str, Any]) -> str:
    model, slices = str(device.get("model", "GPU")), device.get("slices") or ()
    return f"{model} ({', '.join(map(str, slices))})" if slices else model


def _part(free: float, whole: float) -> str:
    return f"{free:g}/{whole:g} free" if free else f"{whole:g}"
