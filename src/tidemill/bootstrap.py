"""The one place where concrete classes meet: a home folder becomes a running cloud, and stops being one.

``run_foreground`` is the daemon itself. ``start_daemon`` starts it in the background and waits until it answers;
``stop_daemon`` ends it. Only one daemon can have a home: it holds ``control.lock`` as long as it lives.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import hashlib
import http.client
import json
import logging
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tidemill.errors import Conflict, InvalidSetting, NotFound, TidemillError, Unavailable

log = logging.getLogger(__name__)
STARTING_TIMEOUT_S = 60.0


def run_foreground(home: Path, overrides: Mapping[str, Any], *, ready: Any = None) -> None:
    """Nothing, when the cloud in ``home`` was told to stop (SIGTERM, SIGINT). What runs in it goes on running.

    ``ready`` is called once it answers. Raises: TidemillError when it cannot start; then nothing is left running.
    """
    from tidemill.api.app import close_streams, create_app
    from tidemill.control.restoring import finish
    from tidemill.control.settings import load_settings

    told: list[bool] = []

    def tell() -> None:
        if ready is not None and not told:
            told.append(True)
            ready()

    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    load_settings(home, overrides)
    with contextlib.ExitStack() as stack:
        stack.enter_context(locked(home))
        finish(home)
        settings = load_settings(home, overrides)
        api_socket = stack.enter_context(_listening(settings.host, settings.port, "--port"))
        settings = replace(settings, port=api_socket.getsockname()[1])
        if not settings.gateway_port:  # any: chosen here, so that all its workers have it and everybody is told
            with _listening(settings.host, 0, "--gateway-port") as free:
                settings = replace(settings, gateway_port=free.getsockname()[1])
        gateway = _Gateway(settings)
        stack.callback(gateway.close)
        if not gateway.is_adopted:
            with _listening(settings.host, settings.gateway_port, "--gateway-port"):
                log.debug("port %s is free for the gateway", settings.gateway_port)
        _write_endpoint(settings)
        certificate = _certificate(settings)
        candidate = None
        if settings.shared:
            candidate = _stand_by(settings, overrides, api_socket, certificate, gateway, tell, stack)
            if candidate is None:
                return
        plane, reports = _build(settings, candidate)
        stack.callback(plane.store.close)
        app = create_app(plane, certificate)
        server = _server_of(app, certificate)

        def started() -> None:
            plane.start()
            reports.start()
            gateway.start(plane.directory.gateway_token)
            if settings.engine == "ray":
                _start_head(settings, plane, certificate)
            _spare_the_collector()
            log.info("ready at %s, gateway at %s", settings.api_url, settings.gateway_url)
            tell()

        stack.callback(plane.close)
        stack.callback(reports.close)

        def stop(_number: int, _frame: object) -> None:
            server.should_exit = True
            close_streams(app)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        _serve(server, api_socket, started)


def _stand_by(
    settings: Any,
    overrides: Mapping[str, Any],
    api_socket: socket.socket,
    certificate: Any,
    gateway: _Gateway,
    tell: Callable[[], None],
    stack: contextlib.ExitStack,
) -> Any:
    """The candidate of this control plane, which leads from now on; None when it was told to stop before it did.

    Meanwhile it serves by handing on to the one that leads. ``tell`` is called once somebody does. When another one
    takes the lead later, this process begins anew, so that nothing of what it held in memory is acted upon.
    """
    from tidemill.api.standby import Standby
    from tidemill.control.identity import gateway_token, read_pepper
    from tidemill.control.replicas import Candidate
    from tidemill.control.sharing import share
    from tidemill.model.ids import ReplicaId
    from tidemill.store.standing import Standing

    share(settings.home, settings.common)
    standing = Standing(
        settings.database_url,
        own_id=ReplicaId(f"{socket.gethostname()}:{settings.port}:{secrets.token_hex(4)}"),
        own_url=settings.reached_at,
    )
    candidate = Candidate(standing, on_deposed=lambda: _begin_anew(settings.home, overrides))
    stack.callback(candidate.close)
    standby = Standby(api_socket, lambda: candidate.leader_url, certificate=certificate)
    standby.start()
    stack.callback(standby.close)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())

    def look() -> None:
        if candidate.leader_url and not gateway.is_started:
            gateway.start(gateway_token(read_pepper(settings.common / "secret.key", create=False)))
            log.info("ready at %s, standing by for %s", settings.api_url, candidate.leader_url)
            tell()

    if not candidate.stand(stop, look=look):
        return None
    log.info("leading from now on")
    standby.close()
    return candidate


def _begin_anew(home: Path, overrides: Mapping[str, Any]) -> None:
    """Become a new process of the same id, at once: this one does not lead any more."""
    command = [sys.executable, "-m", "tidemill.bootstrap", str(home), json.dumps(dict(overrides)), "-1"]
    os.execv(sys.executable, command)  # noqa: S606 - it is this very program


def _spare_the_collector() -> None:
    """Have cyclic garbage looked for less often: the world is large, lives long, and is free of cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 500, 100)


def _certificate(settings: Any) -> Any:
    """The certificate of the API; None where it has none. Raises: InvalidSetting."""
    if not settings.tls_cert:
        return None
    from tidemill.api.tls import Certificate

    return Certificate(Path(settings.tls_cert), Path(settings.tls_key), name=settings.address)


def _server_of(app: Any, certificate: Any) -> Any:
    """A web server that leaves signals alone: who starts it says what they do."""
    import uvicorn

    from tidemill.api.tls import Entry

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            if certificate is None or not sockets:
                await super().startup(sockets)
                return
            await super().startup([])

            def protocol() -> Any:
                made: Any = self.config.http_protocol_class
                return made(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

            entries: list[Any] = [Entry(one, certificate, protocol) for one in sockets]
            self.servers += entries

    return Server(
        uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            loop="uvloop",
            http="httptools",
            timeout_graceful_shutdown=2,
            timeout_keep_alive=75,
        )
    )


def _serve(server: Any, api_socket: socket.socket, started: Any) -> None:
    """Serve until told to stop; ``started`` runs beside, once requests are answered."""
    failure: list[Exception] = []

    def begin() -> None:
        try:
            while not server.started and not server.should_exit:
                time.sleep(0.005)
            started()
        except Exception as error:  # noqa: BLE001 - raised again by the thread that serves
            failure.append(error)
            server.should_exit = True

    threading.Thread(target=begin, name="start", daemon=True).start()
    server.run(sockets=[api_socket])
    if failure:
        raise failure[0]


def _build(settings: Any, candidate: Any) -> tuple[Any, _Reports]:
    """The control plane of these settings, with everything it needs, not yet acting; and who reports to it.

    ``candidate`` is what leads where there are several; None: there is one.
    """
    from tidemill import catalog
    from tidemill.control.clock import SteadyClock
    from tidemill.control.identity import Directory, read_pepper
    from tidemill.control.plane import ControlPlane
    from tidemill.control.vault import Vault
    from tidemill.model.fleet import Site, SiteKind
    from tidemill.model.ids import SiteId
    from tidemill.store.sql import SqlStore

    store = SqlStore(settings.database_url)
    store.migrate()
    pepper = read_pepper(settings.common / "secret.key", create=not store.tokens())
    carbon = catalog.carbon_intensity(settings.country)
    given = settings.carbon_g_per_kwh
    site = Site(
        id=SiteId(settings.site),
        name=settings.site,
        kind=SiteKind(settings.site_kind),
        engine="local" if settings.engine == "none" else settings.engine,
        country=catalog.country_codes(settings.country)[0] if settings.country else "",
        pue_milli=round(settings.pue * 1000),
        carbon_mg_per_kwh=carbon.mg_per_kwh if given is None else round(given * 1000),
        carbon_source=carbon.source if given is None else "config.yaml",
        lease_ns=settings.lease_ns,
        tariff_micro_per_kwh=round(settings.tariff * 1_000_000),
        carbon_hours=tuple(round(each * 1000) for each in settings.carbon_by_hour),
    )
    directory = Directory(pepper, principals=store.principals(), known=store.tokens())
    _first_admin(settings.common, store, directory)
    clock = SteadyClock()
    engine, sample, reports = _engine(settings, site.id, clock)
    plane = ControlPlane(
        settings=settings,
        store=store,
        engine=engine,
        site=site,
        rates=catalog.rate_card(settings.rates),
        directory=directory,
        vault=Vault(pepper),
        clock=clock,
        sample=sample,
        energy_evidence="measured" if sample() is not None else "estimated",
        on_fenced=candidate.depose if candidate is not None else lambda: os.kill(os.getpid(), signal.SIGTERM),
        holder=candidate.own_id if candidate is not None else "",
        candidate=candidate,
    )
    if settings.cloud:
        _rent(settings, plane, pepper)
    reports.tell = plane.tell
    return plane, reports


def _rent(settings: Any, plane: Any, pepper: bytes) -> None:
    """Have the control plane rent machines. Raises: InvalidSetting, CloudRefused."""
    from tidemill.clouds.ec2 import Ec2
    from tidemill.control.cloudsettings import cloud_settings

    found = cloud_settings(settings.cloud)
    installation = hashlib.sha256(b"installation" + pepper).hexdigest()[:24]
    plane.rent(Ec2(found.ec2, installation=installation), found)


def _engine(settings: Any, site_id: Any, clock: Callable[[], int]) -> tuple[Any, Callable[[], Any], _Reports]:
    """What starts workers, what reads the energy meters of its machines, and what else they have to tell."""
    if settings.engine in ("ray", "none"):
        return None, lambda: None, _Reports(lambda _: (), clock, every_s=60.0)
    if settings.engine == "simulated":
        engine = _simulated(settings, site_id, clock)
        return engine, lambda: None, _Reports(engine.facts, clock, every_s=0.005)
    from tidemill import telemetry
    from tidemill.engines.local import LocalEngine, LocalSettings
    from tidemill.units import parse_duration, parse_size

    def node() -> Any:
        return telemetry.discover_node(
            site_id,
            reserve_cpu_milli=round(settings.reserve_cpus * 1000),
            labels=tuple(sorted(settings.labels.items())),
            taints=settings.taints,
            rack=settings.rack,
            block=settings.block,
            mig_dynamic=settings.mig_dynamic,
        )

    engine = LocalEngine(
        settings.home / "local",
        endpoint_file=settings.home / "endpoint.json",
        node=node,
        settings=LocalSettings(volumes=settings.volume_root, data_cache_bytes=parse_size(settings.data_cache)),
        make_slice=telemetry.SliceMaker().make,
    )
    node_id = node().id
    health = telemetry.HealthWatcher(
        node_id, recheck_ns=parse_duration(settings.device_recheck), hot_ns=parse_duration(settings.device_hot)
    )
    return engine, telemetry.EnergyMeters(node_id).sample, _Reports(health.health_facts, clock, every_s=5.0)


def _simulated(settings: Any, site_id: Any, clock: Callable[[], int]) -> Any:
    from tidemill.engines.simulated import Ending, SimulatedEngine, fleet, script
    from tidemill.units import parse_duration

    try:
        nodes = fleet(settings.simulated, site_id=site_id, boot_id=f"simulated-{time.time_ns()}")
    except ValueError as error:
        mend = "Write for example 5000xH100:8, or 30xcpu:20cpu."
        raise InvalidSetting(str(error), field="simulated", value=settings.simulated, mend=mend) from error
    otherwise = parse_duration(settings.simulated_duration)
    return SimulatedEngine(
        nodes,
        clock=clock,
        duration=lambda spec: script(spec, default_ns=otherwise)[0],
        ending=lambda spec: Ending(exit_code=script(spec, default_ns=otherwise)[1]),
        start_delay_ns=0,
        tells_first=True,
    )


def _start_head(settings: Any, plane: Any, certificate: Any) -> None:
    """Have the head of this machine's Ray cluster running, from before or from now on. Raises: TidemillError."""
    from tidemill.outpost import joining
    from tidemill.outpost.config import OutpostConfig, new_key, read_config, write_config
    from tidemill.outpost.ray import new_token

    home = settings.home / "outpost"
    try:
        config = read_config(home)
    except NotFound:
        config = OutpostConfig(
            control_url="", key=new_key(), node_id=f"node_{new_key()[:16]}", name=socket.gethostname()
        )
    address = settings.address or (joining.own_address("http://192.0.2.1") if settings.is_open else settings.host)
    scheme = "https" if settings.tls_cert else "http"
    control_url = f"{scheme}://{address}:{settings.port}" if settings.is_open else settings.api_url
    given = {"ray_token": new_token(), **config.setting, "ray_port": str(settings.ray_port)}
    if settings.ray_redis:
        given["ray_redis"] = settings.ray_redis
    wanted = replace(
        config,
        engine="ray-head",
        control_url=control_url,
        ca=certificate.authority if certificate is not None else "",
        address=address,
        site=plane.site.name,
        site_id=plane.site.id,
        settings=tuple(sorted(given.items())),
        reserve_cpus=settings.reserve_cpus,
        labels=tuple(sorted(settings.labels.items())),
        taints=settings.taints,
        rack=settings.rack,
        block=settings.block,
        mig_dynamic=settings.mig_dynamic,
        volumes=str(settings.volume_root),
        data_cache=settings.data_cache,
    )
    if not wanted.token:
        organization = plane.store.organizations()[0].id
        outpost, _, secret = plane.sites.adopt(
            plane.site, organization, name=wanted.name, key=wanted.key, engine=wanted.engine
        )
        wanted = replace(wanted, outpost_id=outpost.id, token=secret)
    if wanted != config:
        joining.stop_outpost(home)
        write_config(home, wanted)
    joining.start_outpost(home)


def _stop_head(home: Path) -> None:
    """End the head of this machine's Ray cluster, if there is one; what runs on the cluster's machines goes on."""
    from tidemill.outpost.config import read_config
    from tidemill.outpost.joining import stop_outpost

    with contextlib.suppress(NotFound):
        if read_config(home).engine == "ray-head":
            stop_outpost(home)


class _Reports:
    """Tells the control plane what its machines have to tell by themselves, in order and until it is taken.

    ``facts`` gives what there is since it was last asked, at an instant of ``clock`` in ns, every ``every_s``.
    """

    def __init__(self, facts: Callable[[int], Iterable[Any]], clock: Callable[[], int], *, every_s: float) -> None:
        self._facts = facts
        self._clock = clock
        self._every_s = every_s
        self.tell: Callable[[Any], Any] = list
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def close(self) -> None:
        """Stop telling."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def _run(self) -> None:
        waiting: list[Any] = []
        while not self._closing.wait(self._every_s):
            try:
                waiting = waiting or list(self._facts(self._clock()))
                if waiting:
                    self.tell(waiting).result(timeout=60)
                waiting = []
            except (TidemillError, TimeoutError) as error:
                log.warning("what machines report was not taken and is told again: %s", error)
                self._closing.wait(0.5)
            except Exception:
                log.exception("what machines report cannot be taken")
                waiting = []


def _first_admin(home: Path, store: Any, directory: Any) -> None:
    """On a new database: an organization, a project and an administrator, whose token is put into a 0600 file."""
    from tidemill.model.ids import OrganizationId, PrincipalId, ProjectId
    from tidemill.model.tenant import Organization, Principal, PrincipalKind, Project, Scope

    if directory.all():
        return
    now = time.time_ns()
    organization = Organization(id=OrganizationId("org_default"), name="default", created_ns=now)
    project = Project(id=ProjectId("prj_default"), organization_id=organization.id, name="default", created_ns=now)
    admin = Principal(
        id=PrincipalId("usr_admin"),
        organization_id=organization.id,
        kind=PrincipalKind.USER,
        name="admin",
        created_ns=now,
    )
    token, secret = directory.mint(
        None, admin, name="first admin", scopes=(Scope.ADMIN,), project=ProjectId(""), expires_ns=0, now=now
    )
    path = home / "admin.token"
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secret + "\n")
        file.flush()
        os.fsync(file.fileno())
    store.put_organization(organization)
    store.put_project(project)
    store.put_principal(admin)
    store.put_token(token)
    directory.remember(token, admin)


class _Gateway:
    """The gateway's processes, each started again whenever it ends.

    They serve on while the control plane is away: one that outlived a crash is adopted when it listens where it should,
    and replaced otherwise. Where there are several, the kernel gives each its part of the connections.
    """

    def __init__(self, settings: Any) -> None:
        home, count = settings.home, settings.gateway_workers
        self._token_file = home / "gateway.token"
        command = [
            sys.executable, "-m", "tidemill.gateway",
            "--listen", f"{settings.host}:{settings.gateway_port}",
            "--control", settings.api_url,
            "--token-file", str(self._token_file),
            "--pepper-file", str(home / "secret.key"),
            "--home", str(home),
            "--drain", "3",
            *(("--traces", settings.traces, "--trace-ratio", f"{settings.trace_ratio:g}") if settings.traces else ()),
        ]  # fmt: skip
        commands = [[*command, "--worker", str(n), "--workers", str(count)] for n in range(count)]
        adopted = _gateways_of(home, commands if count > 1 else [command])
        self._workers = [
            _GatewayWorker(one, home / "gateway.log", adopted=pid)
            for one, pid in zip(commands if count > 1 else [command], adopted, strict=True)
        ]

    @property
    def is_adopted(self) -> bool:
        """Whether one that outlived the last control plane serves already."""
        return any(worker.is_adopted for worker in self._workers)

    @property
    def is_started(self) -> bool:
        """Whether it is kept running."""
        return any(worker.is_started for worker in self._workers)

    def start(self, token: str) -> None:
        """Begin to keep it running; harmless twice. It shows that token to the control plane."""
        if self.is_started:
            return
        with os.fdopen(os.open(self._token_file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(token + "\n")
        for worker in self._workers:
            worker.start()

    def close(self) -> None:
        """End all of it."""
        for worker in self._workers:
            worker.stop()
        for worker in self._workers:
            worker.close()


class _GatewayWorker:
    """One process of the gateway. ``adopted`` is the process id of one that runs already, zero for none."""

    def __init__(self, command: list[str], log_file: Path, *, adopted: int) -> None:
        self._command = command
        self._log = log_file
        self._adopted = adopted
        self._closing = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._keep, name="gateway", daemon=True)

    @property
    def is_adopted(self) -> bool:
        """Whether it serves already."""
        return bool(self._adopted)

    @property
    def is_started(self) -> bool:
        """Whether it is kept running."""
        return self._thread.ident is not None

    def start(self) -> None:
        """Begin to keep it running."""
        self._thread.start()

    def stop(self) -> None:
        """Ask it to end."""
        self._closing.set()
        with contextlib.suppress(ProcessLookupError):
            if self._adopted:
                os.kill(self._adopted, signal.SIGTERM)
            if self._process is not None:
                self._process.terminate()

    def close(self) -> None:
        """End it."""
        self.stop()
        if self._adopted:
            _end(self._adopted)
        if self._process is not None:
            try:
                self._process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self._process.kill()

    def _keep(self) -> None:
        while self._adopted and not self._closing.wait(0.2):
            if not Path(f"/proc/{self._adopted}").exists():
                self._adopted = 0
        pause = 0.2
        while not self._closing.is_set():
            with self._log.open("ab") as output:
                began = time.monotonic()
                self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
                status = self._process.wait()
            if self._closing.is_set():
                return
            pause = 0.2 if time.monotonic() - began > 10 else min(pause * 2, 5.0)
            log.warning("the gateway ended with status %s and is started again", status)
            self._closing.wait(pause)


def _gateways_of(home: Path, commands: list[list[str]]) -> list[int]:
    """The process ids of the gateways of this home that run these very commands, or 0; all others of it are ended."""
    adopted = [0] * len(commands)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
            except OSError:
                continue
            if found[1:3] == ["-m", "tidemill.gateway"] and "--home" in found and str(home) in found:
                place = next((n for n, one in enumerate(commands) if found[1:] == one[1:] and not adopted[n]), None)
                if place is None:
                    _end(int(entry.name))
                else:
                    adopted[place] = int(entry.name)
    return adopted


def _end(pid: int) -> None:
    """Ask a process to end, and see that it does."""
    for number, patience_s in ((signal.SIGTERM, 5.0), (signal.SIGKILL, 5.0)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        deadline = time.monotonic() + patience_s
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            time.sleep(0.02)


def backup(home: Path, path: Path, *, logs: bool = True, database: str = "") -> Any:
    """The ``control.archive.Manifest`` of the new, verified backup at ``path``. The cloud may run, and goes on.

    ``database`` is the address that it was started with, where neither ``config.yaml`` nor the running cloud says.
    Raises: as ``write_backup``.
    """
    from tidemill.control.archive import write_backup
    from tidemill.control.settings import load_settings

    with contextlib.suppress(TidemillError, OSError):
        database = database or command_of_daemon(home)[1].get("database") or ""
    settings = load_settings(home, {"database": database or None})
    return write_backup(home, settings.database_url, path, logs=logs, now_ns=time.time_ns())


def restore(path: Path, home: Path, *, database: str = "", is_replaced: bool = False) -> Any:
    """What is in ``home`` now (``control.restoring.Restored``). Raises: as there; Conflict while a cloud runs in it."""
    from tidemill.control import restoring

    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    with locked(home):
        return restoring.restore(path, home, database=database, is_replaced=is_replaced, now_ns=time.time_ns())


@contextlib.contextmanager
def locked(home: Path) -> Iterator[None]:
    """Hold the home's lock. Raises: Conflict when another daemon has it."""
    descriptor = os.open(home / "control.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Conflict(
                "A cloud is running in this home already.",
                field="home",
                value=str(home),
                mend="Use it, or end it with tidemill down.",
            ) from error
        yield
    finally:
        os.close(descriptor)


def is_running(home: Path) -> bool:
    """Whether a daemon holds this home."""
    try:
        descriptor = os.open(home / "control.lock", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _listening(host: str, port: int, option: str) -> socket.socket:
    """A socket bound to that port. Raises: Conflict that names the port and the option to change it."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise Conflict(
            f"Port {port} on {host} cannot be used: {error.strerror}.",
            field=option.lstrip("-").replace("-", "_"),
            value=port,
            mend=f"Choose another with {option}, or end what uses it.",
        ) from error
    return listener


def _write_endpoint(settings: Any) -> None:
    """Say where this cloud answers, for the command line, the runners and the gateway. Replaced in one step."""
    path = settings.home / "endpoint.json"
    content = {"api_url": settings.api_url, "gateway_url": settings.gateway_url, "pid": os.getpid()}
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(content))
    draft.replace(path)


def read_endpoint(home: Path) -> dict[str, Any]:
    """Where the cloud of this home answers. Raises: Unavailable when there is none."""
    try:
        endpoint = json.loads((home / "endpoint.json").read_text())
    except (FileNotFoundError, json.JSONDecodeError) as error:
        raise Unavailable(
            "No cloud is running here.", field="home", value=str(home), mend="Start one with tidemill up."
        ) from error
    if not isinstance(endpoint, dict):
        raise Unavailable("No cloud is running here.", mend="Start one with tidemill up.")
    return endpoint


def start_daemon(
    home: Path, overrides: Mapping[str, Any], *, python: str = sys.executable, timeout_s: float | None = None
) -> dict[str, Any]:
    """Where the cloud answers that now runs in the background, by that ``python``'s version of Tidemill.

    Raises: TidemillError as ``run_foreground`` does; Unavailable when it is not ready in time, and then it is ended.
    """
    home.mkdir(parents=True, exist_ok=True, mode=0o700)
    if is_running(home):
        raise Conflict(
            "A cloud is running in this home already.",
            field="home",
            value=str(home),
            mend="Use it, or end it with tidemill down.",
        )
    reading, writing = os.pipe()
    command = [python, "-m", "tidemill.bootstrap", str(home), json.dumps(dict(overrides)), str(writing)]
    with (home / "control.log").open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            pass_fds=(writing,),
            cwd="/",
        )
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        if timeout_s is not None and not select.select([pipe], [], [], timeout_s)[0]:
            process.kill()
            process.wait()
            mend = f"See {home / 'control.log'}."
            raise Unavailable(f"The control plane was not ready within {timeout_s:g} s.", mend=mend)
        answer = pipe.read()
    if answer == b"ready":
        return read_endpoint(home)
    process.wait(timeout=STARTING_TIMEOUT_S)
    raise _startup_error(answer, home)


def _startup_error(answer: bytes, home: Path) -> TidemillError:
    try:
        told = json.loads(answer)
    except ValueError:
        return TidemillError("The control plane ended while it started.", mend=f"See {home / 'control.log'}.")
    for kind in _every_error(TidemillError):
        if kind.code == told["code"]:
            return kind(told["detail"], field=told["field"], value=told["value"], mend=told["mend"])
    return TidemillError(told["detail"], mend=told["mend"])


def _every_error(kind: type[TidemillError]) -> Iterator[type[TidemillError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _every_error(below)


def command_of_daemon(home: Path) -> tuple[str, dict[str, Any]]:
    """The python and the settings with which the cloud of this home was started in the background.

    Raises: Unavailable when none runs, Conflict when it runs in the foreground, where somebody else has to start it.
    """
    if not is_running(home):
        raise Unavailable("No cloud is running here.", field="home", value=str(home), mend="tidemill up starts one.")
    pid = int(read_endpoint(home)["pid"])
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    if words[1:3] != ["-m", "tidemill.bootstrap"]:
        raise Conflict(
            "The cloud was not started in the background.",
            field="home",
            value=str(home),
            mend="Take a backup, install the new version, and let what started it start it again.",
        )
    return words[0], json.loads(words[4])


def stop_daemon(home: Path, *, stop_jobs: bool, timeout_s: float = 60.0) -> bool:
    """Whether a daemon was running; it is gone now. With ``stop_jobs`` its jobs are ended first, with their grace.

    Raises: Conflict when some of them have not ended in time; Unavailable when it does not say so. Then it runs on,
    for nobody else would see to their end.
    """
    if not is_running(home):
        return False
    endpoint = read_endpoint(home)
    deadline = time.monotonic() + timeout_s
    if stop_jobs:
        token = (home / "admin.token").read_text().strip()
        _stop_all_jobs(str(endpoint["api_url"]), token, deadline)
    deadline = max(deadline, time.monotonic())
    with contextlib.suppress(ProcessLookupError):
        os.kill(int(endpoint["pid"]), signal.SIGTERM)
    _stop_head(home / "outpost")
    while is_running(home):
        if time.monotonic() > deadline + 15:
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(endpoint["pid"]), signal.SIGKILL)
        time.sleep(0.02)
    return True


def _stop_all_jobs(api_url: str, token: str, deadline: float) -> None:
    """Have every job end, and none begin meanwhile, until all are over. Raises: as ``stop_daemon``."""
    left: dict[str, Any] | None = None
    trouble = "it did not answer"
    while True:
        try:
            status, answer = _ask_to_end(api_url, token, timeout_s=max(5.0, deadline - time.monotonic()))
        except (OSError, http.client.HTTPException, ValueError) as error:
            trouble = str(error) or type(error).__name__
        else:
            if status == 202:
                left = answer
                if not answer["live"]:
                    return
            else:
                trouble = str(answer.get("detail") or f"it answered with {status}")
                if status < 500:
                    break
        if time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    mend = "Give them longer (--timeout S), or leave them running (--keep-jobs): the next tidemill up adopts them."
    if left is None:
        raise Unavailable(f"The cloud could not be asked to end its jobs: {trouble}. It runs on.", mend=mend)
    shown = ", ".join(f"{job['name']} ({job['id']}, {job['state']})" for job in left["jobs"])
    more = left["live"] - len(left["jobs"])
    raise Conflict(
        f"Not over yet: {shown}{f' and {more} more' if more else ''}. The cloud runs on, and sees to their end.",
        field="jobs",
        value=left["live"],
        mend=mend,
    )


def _ask_to_end(api_url: str, token: str, *, timeout_s: float) -> tuple[int, dict[str, Any]]:
    """The status and the body of what this machine's control plane answers when it is asked to end all jobs.

    Raises: OSError, HTTPException, ValueError.
    """
    body = json.dumps({"all": True})
    headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    connection = http.client.HTTPConnection(api_url.removeprefix("http://"), timeout=timeout_s)
    try:
        connection.request("POST", "/v1/jobs/stop", body, headers)
        response = connection.getresponse()
        answer = json.loads(response.read())
    finally:
        connection.close()
    return response.status, answer if isinstance(answer, dict) else {}


def main() -> None:
    """The background process of ``start_daemon``: says through a pipe when it is ready, or why it cannot be."""
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("overrides", type=json.loads)
    parser.add_argument("pipe", type=int, help="-1: nobody waits")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if given.pipe >= 0:
        os.set_inheritable(given.pipe, False)
    pipe = os.fdopen(given.pipe if given.pipe >= 0 else os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), "wb")

    def ready() -> None:
        pipe.write(b"ready")
        pipe.close()

    try:
        run_foreground(given.home, given.overrides, ready=ready)
    except TidemillError as error:
        log.error("%s", error)
        if not pipe.closed:
            told = {"code": error.code, "detail": error.detail, "field": error.field, "value": error.value}
            pipe.write(json.dumps(told | {"mend": error.mend}, default=str).encode())
        raise SystemExit(error.kind.exit_status) from error


if __name__ == "__main__":
    main()
