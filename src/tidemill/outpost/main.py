"""The process of an outpost: works this machine, or heads a cluster, for the control plane that it dials out to.

What runs on its machines goes on when it ends, and is found again when it starts.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final

from tidemill.errors import Conflict, InvalidSetting, TidemillError
from tidemill.model.events import Brought
from tidemill.model.fleet import Node
from tidemill.model.ids import NodeId, SiteId
from tidemill.outpost.config import OutpostConfig, read_config
from tidemill.outpost.link import Link, Removed
from tidemill.outpost.spool import Spool
from tidemill.ports import Engine
from tidemill.runner.client import Channel
from tidemill.runner.folders import read_json, write_json
from tidemill.units import MILLI, MINUTE_NS, parse_size

log = logging.getLogger(__name__)
ENDPOINT: Final = "endpoint.json"
FACTS: Final = "facts.jsonl"
HEALTH: Final = "health.json"
_RECHECK_NS: Final = 10 * MINUTE_NS
_HOT_NS: Final = 2 * MINUTE_NS


def run(home: Path, *, ready: Callable[[], None] = lambda: None) -> None:
    """Nothing, when the outpost of that home was told to stop (SIGTERM, SIGINT) or was removed from its cloud.

    Raises: NotFound, InvalidSetting, Conflict when it runs already.
    """
    config = read_config(home)
    with locked(home):
        write_endpoint(home, config)
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        match config.engine:
            case "local":
                _work_machine(home, config, stop, ready)
            case "slurm":
                _work_centre(home, config, stop, ready)
            case "kubernetes":
                _work_cluster(home, config, stop, ready)
            case "ray" | "ray-head":
                from tidemill.outpost import ray

                (ray.run_head if config.engine == "ray-head" else ray.run_member)(home, config, stop, ready)
            case _:
                raise InvalidSetting("There is no such engine.", field="engine", value=config.engine)


def channel_of(home: Path, config: OutpostConfig) -> Channel:
    """A connection to the control plane as this outpost."""
    return Channel(
        api_url=config.control_url,
        endpoint_file=home / ENDPOINT,
        token=config.token,
        prefix="/v1/outposts/self",
        ca=config.ca,
    )


def link_of(
    home: Path,
    config: OutpostConfig,
    engine: Engine,
    *,
    facts: Callable[[], Iterable[Brought]] | None = None,
    kept: Callable[[], None] = lambda: None,
    offer: Callable[[], tuple[tuple[str, str], ...]] = tuple,
    tell: Callable[[tuple[str, ...]], None] = lambda _: None,
) -> Link:
    """The conversation of this outpost with whichever control plane leads, about that engine.

    ``facts`` None: its machines have nothing to tell by themselves.
    ``tell`` passes the addresses of the control planes on to machines for which this outpost speaks.
    """

    def moved(replicas: tuple[str, ...]) -> None:
        write_endpoint(home, config, replicas)
        tell(replicas)

    return Link(
        engine,
        channel_of(home, config),
        api_url=config.control_url,
        ca=config.ca,
        facts=facts or tuple,
        spool=Spool(home / FACTS) if facts is not None else None,
        kept=kept,
        offer=offer,
        moved=moved,
    )


def describe(config: OutpostConfig, home: Path) -> Node:
    """This machine as a node of the outpost's site."""
    from tidemill import telemetry

    return telemetry.discover_node(
        SiteId(config.site_id),
        identity=NodeId(config.node_id),
        name=config.name,
        address=config.address,
        disk=home,
        reserve_cpu_milli=round(config.reserve_cpus * MILLI),
        labels=config.labels,
        taints=config.taints,
        rack=config.rack,
        block=config.block,
        mig_dynamic=config.mig_dynamic,
    )


def machine(home: Path, config: OutpostConfig) -> tuple[Engine, Callable[[], list[Brought]], Callable[[], None]]:
    """The engine of this machine, what it has to tell since it was last asked, and what to call when that is kept."""
    from tidemill import telemetry
    from tidemill.engines.local import LocalEngine, LocalSettings
    from tidemill.telemetry.interruption import InterruptionWatcher

    node_id = NodeId(config.node_id)
    engine = LocalEngine(
        home / "local",
        endpoint_file=home / ENDPOINT,
        node=lambda: describe(config, home),
        settings=LocalSettings(
            address=config.address,
            volumes=Path(config.volumes) if config.volumes else None,
            data_cache_bytes=parse_size(config.data_cache),
        ),
        make_slice=telemetry.SliceMaker().make,
    )
    engine.guard()
    meters = telemetry.EnergyMeters(node_id)
    known = read_json(home / HEALTH) or {}
    health = telemetry.HealthWatcher(node_id, recheck_ns=_RECHECK_NS, hot_ns=_HOT_NS, known=known)
    notices = InterruptionWatcher(node_id) if is_in_cloud() else None

    def facts() -> list[Brought]:
        sampled = meters.sample()
        told: list[Brought] = [sampled] if sampled is not None else []
        now = time.time_ns()
        interrupted = notices.interruption_facts(now) if notices is not None else []
        return [*told, *health.health_facts(now), *interrupted]

    def kept() -> None:
        nonlocal known
        if (now := health.known) != known:
            write_json(home / HEALTH, now, durable=True)
            known = now

    return engine, facts, kept


def is_in_cloud() -> bool:
    """Whether this machine is an instance of Amazon's, by what its firmware says."""
    for name in ("sys_vendor", "board_vendor"):
        with contextlib.suppress(OSError):
            if "Amazon EC2" in Path(f"/sys/class/dmi/id/{name}").read_text():
                return True
    return False


def serve(link: Link, stop: threading.Event, ready: Callable[[], None]) -> None:
    """Serve until told to stop, or removed."""

    def end() -> None:
        stop.wait()
        link.close()

    threading.Thread(target=end, name="stop", daemon=True).start()
    ready()
    try:
        link.run()
    except Removed as error:
        log.warning("this machine does not belong to the cloud any more: %s", error)


def write_endpoint(home: Path, config: OutpostConfig, replicas: Iterable[str] | None = None) -> None:
    """Say where the control plane answers, for the runners here; replaced in one step.

    ``replicas`` are where those are reached that may stand in for it; None: those that were written down before.
    """
    path = home / ENDPOINT
    others = list(replicas) if replicas is not None else (read_json(path) or {}).get("others", [])
    draft = path.with_suffix(f".{os.getpid()}.new")  # the head of a cluster and its machine's agent share a home
    draft.write_text(json.dumps({"api_url": config.control_url, "others": others, "ca": config.ca}))
    draft.replace(path)


def _work_machine(home: Path, config: OutpostConfig, stop: threading.Event, ready: Callable[[], None]) -> None:
    engine, facts, kept = machine(home, config)
    try:
        serve(link_of(home, config, engine, facts=facts, kept=kept), stop, ready)
    finally:
        engine.close()


def _work_centre(home: Path, config: OutpostConfig, stop: threading.Event, ready: Callable[[], None]) -> None:
    """Work the Slurm cluster that this machine submits to. The home is on a file system that its nodes share."""
    from tidemill.engines.slurm import SlurmEngine, SlurmSettings

    given: dict[str, Any] = {
        name: value for name, value in config.settings if name in SlurmSettings.__dataclass_fields__
    }
    settings = SlurmSettings(**given)
    endpoint = home / ENDPOINT
    engine = SlurmEngine(home / "slurm", site_id=SiteId(config.site_id), endpoint_file=endpoint, settings=settings)
    engine.nodes()
    serve(link_of(home, config, engine), stop, ready)


def _work_cluster(home: Path, config: OutpostConfig, stop: threading.Event, ready: Callable[[], None]) -> None:
    """Work the Kubernetes cluster whose API server is reached from here."""
    from tidemill.engines.kubernetes import ApiServer, KubernetesEngine
    from tidemill.engines.pods import settings_of

    settings = settings_of(config.setting)
    api = ApiServer(kubeconfig=settings.kubeconfig, context=settings.context)
    engine = KubernetesEngine(api, site_id=SiteId(config.site_id), settings=settings)
    engine.nodes()
    try:
        serve(link_of(home, config, engine), stop, ready)
    finally:
        engine.close()


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the outpost's lock. Raises: Conflict when another process has it."""
    descriptor = os.open(home / "outpost.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                "The outpost of this home runs already.",
                field="home",
                value=str(home),
                mend="Use it, or have it leave: tidemill leave.",
            ) from None
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def running_pid(home: Path) -> int:
    """The process id of the outpost that runs in that home; zero when none does."""
    try:
        descriptor = os.open(home / "outpost.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(descriptor, 20, 0) or b"0")
    finally:
        os.close(descriptor)
    return 0


def main() -> None:
    """The background process: says through a pipe when it serves, or why it cannot."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("pipe", type=int, nargs="?", default=-1)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    told: list[bool] = []

    def tell(content: dict[str, Any]) -> None:
        if given.pipe >= 0 and not told:
            told.append(True)
            os.set_inheritable(given.pipe, False)
            with os.fdopen(given.pipe, "wb") as pipe:
                pipe.write(json.dumps(content, default=str).encode())

    try:
        run(given.home, ready=lambda: tell({"ready": True}))
    except TidemillError as error:
        log.error("%s", error)
        tell({"code": error.code, "detail": error.detail, "field": error.field, "mend": error.mend})
        sys.exit(error.kind.exit_status)


if __name__ == "__main__":
    main()
