"""Machines of a Ray cluster, and its head: what is started on each, and started again whenever it ends.

``head`` and ``member`` each keep ``ray start --block`` running. The head also keeps a process that is Ray's driver and
carries out the control plane's calls; it is one of its own, because Ray ends a driver that lost its cluster.
"""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil

from tidemill.engines.ray import RayEngine, node_resource, node_resources
from tidemill.errors import EngineLost, InvalidSetting
from tidemill.outpost.carrying import carry_out
from tidemill.outpost.config import OutpostConfig, read_config
from tidemill.outpost.main import ENDPOINT, describe, link_of, machine, serve, write_endpoint
from tidemill.runner.folders import read_json
from tidemill.units import MILLI
from tidemill.wire.outposts import EngineCall, report_of

log = logging.getLogger(__name__)
HOME_VARIABLE: Final = "TIDEMILL_OUTPOST_HOME"
DEFAULT_PORT: Final = 6379
_CALLS: Final = msgspec.json.Decoder(EngineCall)
_ANSWERS: Final = msgspec.json.Encoder()
_OBJECT_STORE: Final = 100 * 1024 * 1024
_LONGEST_PAUSE_S: Final = 10.0
_ENDING_S: Final = 3.0
_HEADS: Final = ("gcs_server", "monitor.py", "dashboard.py")
"""What runs on a cluster's head only."""


class NodeAgent:
    """Works one machine of a Ray cluster, as a Ray actor: its home is where the machine joined from."""

    def __init__(self) -> None:
        self._home = Path(os.environ[HOME_VARIABLE])
        self._config = read_config(self._home)
        self._engine, self._facts, self._kept = machine(self._home, self._config)
        self._replicas: tuple[str, ...] = ()
        self._writing = threading.Lock()

    def call(self, request: bytes) -> bytes:
        """The answer to a call of the engine, both as JSON; what it says of the control planes is kept for runners."""
        call = _CALLS.decode(request)
        with self._writing:
            if call.replicas and call.replicas != self._replicas:
                write_endpoint(self._home, self._config, call.replicas)
                self._replicas = call.replicas
        return _ANSWERS.encode(carry_out(self._engine, call))

    def facts(self) -> bytes:
        """What the machine has to tell since it was last asked, as JSON."""
        told = _ANSWERS.encode(report_of(self._facts()))
        self._kept()
        return told


def new_token() -> str:
    """A token for a new cluster, which every process of it presents."""
    return secrets.token_hex(32)


def run_member(home: Path, config: OutpostConfig, stop: threading.Event, ready: Callable[[], None]) -> None:
    """Be a machine of the cluster until told to stop. Raises: InvalidSetting without Ray or the cluster's address."""
    with member(home, config):
        ready()
        stop.wait()


@contextmanager
def member(home: Path, config: OutpostConfig) -> Iterator[None]:
    """This machine is part of the cluster meanwhile. Raises: InvalidSetting without Ray or the cluster's address."""
    if "ray_address" not in config.setting:
        raise InvalidSetting(
            f"The head of {config.site}'s Ray cluster is not there now.",
            field="site", value=config.site, mend="Start it, tidemill up --engine ray, and join again.",
        )  # fmt: skip
    command = [_ray(), "start", "--address", config.setting["ray_address"], *_common(home, config)]
    with _Kept("ray", command, _environment(home, config), home, is_left=lambda text: _is_ray_of(config, text)):
        yield


def run_head(home: Path, config: OutpostConfig, stop: threading.Event, ready: Callable[[], None]) -> None:
    """Head a cluster until told to stop. Raises: InvalidSetting without Ray."""
    driver = [sys.executable, "-m", "tidemill.outpost.driver", str(home)]

    def is_left(text: str) -> bool:
        return text.endswith(f"tidemill.outpost.driver {home}")

    with head(home, config), _Kept("driver", driver, _environment(home, config), home, is_left=is_left):
        ready()
        stop.wait()


@contextmanager
def head(home: Path, config: OutpostConfig) -> Iterator[str]:
    """The address of a cluster that this machine heads meanwhile. Raises: InvalidSetting without Ray."""
    port = config.setting.get("ray_port", str(DEFAULT_PORT))
    environment = _environment(home, config)
    start = [
        _ray(), "start", "--head", "--port", port, "--include-dashboard", "false", *_common(home, config),
    ]  # fmt: skip

    def is_left(text: str) -> bool:
        return _is_ray_of(config, text) or (f"{_folder(home)}/" in text and any(name in text for name in _HEADS))

    with _Kept("ray", start, environment, home, is_left=is_left):
        yield _address(config)


def drive(home: Path) -> None:
    """Carry out the control plane's calls on the cluster that this machine heads, until told to stop."""
    config = read_config(home)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    address = _address(config)
    while not stop.is_set():
        try:
            engine = RayEngine(address, NodeAgent, token=config.setting["ray_token"])
            break
        except EngineLost as error:
            log.info("%s", error)
            stop.wait(0.5)
    else:
        return
    offer = (("ray_address", address), ("ray_token", config.setting["ray_token"]))
    engine.replicas = tuple((read_json(home / ENDPOINT) or {}).get("others", ()))

    def tell(replicas: tuple[str, ...]) -> None:
        engine.replicas = replicas

    link = link_of(home, config, engine, facts=engine.facts, offer=lambda: offer, tell=tell)
    try:
        serve(link, stop, lambda: None)
    finally:
        engine.close()


def _is_ray_of(config: OutpostConfig, text: str) -> bool:
    """Whether a command line is of Ray on this machine, and not of a worker, whose folders may have any name."""
    return node_resource(config.node_id) in text and "ray" in text


def _address(config: OutpostConfig) -> str:
    return f"{config.address}:{config.setting.get('ray_port', DEFAULT_PORT)}"


def _common(home: Path, config: OutpostConfig) -> list[str]:
    node = describe(config, home)
    return [
        "--block", "--node-ip-address", config.address, "--temp-dir", _folder(home), "--disable-usage-stats",
        "--include-log-monitor", "false",
        "--num-cpus", str(-(-node.cpu_milli // MILLI)), "--num-gpus", str(len(node.devices)),
        "--object-store-memory", str(_OBJECT_STORE), "--resources", node_resources(config.node_id),
    ]  # fmt: skip


def _environment(home: Path, config: OutpostConfig) -> dict[str, str]:
    write_endpoint(home, config)
    given = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": config.setting["ray_token"],
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_memory_monitor_refresh_ms": "0",  # what jobs may use is limited by their own control groups
        "RAY_DEDUP_LOGS": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "TIDEMILL_OUTPOST_HOME": str(home),
    }
    if redis := config.setting.get("ray_redis"):
        # Clusters that share a Redis have names of their own there: it is the outpost that stays the same.
        given |= {"RAY_REDIS_ADDRESS": redis, "RAY_external_storage_namespace": config.node_id}
    return {**os.environ, **given}


def _ray() -> str:
    """The ray command of this environment. Raises: InvalidSetting when it is not installed."""
    command = Path(sys.executable).with_name("ray")
    if not command.exists():
        raise InvalidSetting(
            "Ray is not installed.", field="engine", value="ray", mend="Install it: pip install 'tidemill[ray]'."
        )
    return str(command)


def _folder(home: Path) -> str:
    """Where Ray keeps its sockets: sockets need short paths, and each home one of its own."""
    return f"/tmp/tidemill-ray-{hashlib.sha256(os.fsencode(home)).hexdigest()[:8]}"  # noqa: S108 - Ray makes it 0700


class _Kept:
    """A process that is started again whenever it ends, later after each quick end, and gone at the end.

    ``is_left`` tells from a command line whether an earlier one left that process behind: it is ended first.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        home: Path,
        *,
        is_left: Callable[[str], bool] = lambda _: False,
    ) -> None:
        self._name = name
        self._command = list(command)
        self._environment = dict(environment)
        self._log = home / f"{name}.log"
        self._is_left = is_left
        self._closing = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name=name, daemon=True)

    def __enter__(self) -> _Kept:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._closing.set()
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_ENDING_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._thread.join(15)
        self._sweep()

    def _keep(self) -> None:
        pause = 0.2
        while not self._closing.is_set():
            self._sweep()
            with self._log.open("ab") as output:
                began = time.monotonic()
                self._process = subprocess.Popen(
                    self._command, env=self._environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                    cwd="/",
                )  # fmt: skip
                status = self._process.wait()
            if self._closing.is_set():
                return
            pause = 0.2 if time.monotonic() - began > 30 else min(pause * 2, _LONGEST_PAUSE_S)
            log.warning("%s ended with status %s and is started again", self._name, status)
            self._closing.wait(pause)

    def _sweep(self) -> None:
        """End what an earlier one left behind."""
        found = psutil.process_iter(["cmdline"])
        left = [process for process in found if self._is_left(" ".join(process.info["cmdline"] or ()))]
        for process in left:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(left, timeout=5)
