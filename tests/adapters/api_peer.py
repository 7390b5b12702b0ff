"""The API over a real control plane with a real store, and an engine whose workers do what the test says."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn

from tidemill.api.app import close_streams, create_app
from tidemill.control.identity import Directory
from tidemill.control.plane import ControlPlane
from tidemill.control.settings import Settings
from tidemill.control.vault import Vault
from tidemill.model.fleet import Node, NodeState, Site, SiteKind
from tidemill.model.ids import LaunchId, NodeId, OrganizationId, PrincipalId, ProjectId, SiteId
from tidemill.model.ledger import Rate, RateCard
from tidemill.model.plan import LaunchSpec, Observation, ObservedState, Sight
from tidemill.model.tenant import Organization, Principal, PrincipalKind, Project, Scope
from tidemill.ports import EngineCapabilities
from tidemill.store.sql import SqlStore

ROLES: dict[str, tuple[Scope, ...]] = {
    "admin": (Scope.ADMIN,),
    "reader": (Scope.READ,),
    "submitter": (Scope.SUBMIT,),
    "executor": (Scope.EXEC,),
    "caller": (Scope.INFER,),
}
PEPPER = bytes(range(32))


def eventually(look: Callable[[], Any], *, within_s: float = 10.0, what: str = "it") -> Any:
    """The first true answer of ``look``."""
    deadline = time.monotonic() + within_s
    pause = threading.Event()
    while not (answer := look()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {within_s} s: {what}")
        pause.wait(0.005)
    return answer


class PuppetEngine:
    """An engine that starts nothing: workers are alive until the test says otherwise."""

    capabilities = EngineCapabilities(name="puppet", images=False, exec=True, places=True)

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._nodes = tuple(nodes)
        self._seen: dict[LaunchId, ObservedState] = {}
        self.specs: dict[LaunchId, LaunchSpec] = {}
        self.lingers = False
        """Whether a worker that is told to stop takes its time, as those do that write a checkpoint."""

    def nodes(self) -> tuple[Node, ...]:
        return self._nodes

    def launch(self, spec: LaunchSpec) -> None:
        self.specs[spec.launch_id] = spec
        self._seen.setdefault(spec.launch_id, ObservedState.ALIVE)

    def stop(self, launch_id: LaunchId, *, node_id: NodeId, grace_ns: int) -> None:
        if not self.lingers:
            self._seen[launch_id] = ObservedState.GONE

    def observe(self) -> Sight:
        here = self._nodes[0].id
        listed = list(self._seen.items())
        seen = tuple(Observation(launch_id=launch, node_id=here, state=state) for launch, state in listed)
        return Sight(nodes=frozenset(node.id for node in self._nodes), launches=seen)

    def lose(self, launch_id: LaunchId) -> None:
        self._seen[launch_id] = ObservedState.GONE

    def forget(self, launch_id: LaunchId, *, node_id: NodeId) -> None:
        self._seen.pop(launch_id, None)

    def close(self) -> None: ...


class Peer:
    """Two organizations on one cloud, each with the roles of ``ROLES`` as tokens, and a server in a thread."""

    def __init__(self, home: Path, *, clock: Callable[[], int] = time.time_ns) -> None:
        node = Node(
            id=NodeId("node_a"), site_id=SiteId("here"), name="a", state=NodeState.READY, version=1, boot_id="b",
            address="127.0.0.1", cpu_milli=512_000, memory_bytes=32 << 30, disk_bytes=1 << 40,
        )  # fmt: skip
        self.home = home
        self.engine = PuppetEngine([node])
        store = SqlStore(f"sqlite:///{home / 'control.db'}")
        store.migrate()
        self.tokens: dict[tuple[str, str], str] = {}
        directory = Directory(PEPPER, principals=(), known=())
        for name in ("one", "two"):
            organization = Organization(id=OrganizationId(f"org_{name}"), name=name, created_ns=1)
            principal = Principal(
                id=PrincipalId(f"usr_{name}"), organization_id=organization.id, kind=PrincipalKind.USER, name=name, created_ns=1
            )  # fmt: skip
            store.put_organization(organization)
            store.put_principal(principal)
            for project in ("default", "other"):
                store.put_project(
                    Project(
                        id=ProjectId(f"prj_{name}_{project}"), organization_id=organization.id, name=project, created_ns=1
                    )
                )  # fmt: skip
            grants = [(role, scopes, ProjectId("")) for role, scopes in ROLES.items()]
            grants.append(("other", (Scope.READ, Scope.SUBMIT, Scope.EXEC), ProjectId(f"prj_{name}_other")))
            for role, scopes, project_id in grants:
                token, secret = directory.mint(
                    None, principal, name=role, scopes=scopes, project=project_id, expires_ns=0, now=1
                )
                store.put_token(token)
                directory.remember(token, principal)
                self.tokens[name, role] = secret
        self.plane = ControlPlane(
            settings=Settings(home=home),
            store=store,
            engine=self.engine,
            site=Site(id=SiteId("here"), name="here", kind=SiteKind.ONPREM, engine="puppet"),
            rates=RateCard(id="card", rates=(Rate(resource="cpu", micro_per_hour=40_000, source="test"),)),
            directory=directory,
            vault=Vault(PEPPER),
            clock=clock,
        )
        self.plane.start()
        self.app = create_app(self.plane)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port = int(self._socket.getsockname()[1])
        config = uvicorn.Config(
            self.app, log_config=None, access_log=False, loop="uvloop", http="httptools", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        eventually(lambda: self._server.started, what="the server")

    def close(self) -> None:
        close_streams(self.app)
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self.plane.close()
        self.plane.store.close()

    def token(self, role: str = "admin", organization: str = "one") -> str:
        return self.tokens[organization, role]

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
    ) -> tuple[int, Any]:
        """Status and body (decoded when it is JSON)."""
        status, _, content = self.exchange(method, path, body, token=token, headers=headers, raw=raw)
        return status, content

    def exchange(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        token: str | None = None,
        headers: dict[str, str] | None = None,
        raw: bytes | None = None,
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and body (decoded when it is JSON)."""
        sent = {"Authorization": f"Bearer {self.token() if token is None else token}"}
        if body is not None:
            raw = json.dumps(body).encode()
        if raw is not None:
            sent["Content-Type"] = "application/json"
        connection = self.connect()
        try:
            connection.request(method, path, raw, sent | (headers or {}))
            answer = connection.getresponse()
            content: Any = answer.read()
            if "ndjson" not in (kind := answer.headers.get("Content-Type", "")) and "json" in kind:
                content = json.loads(content) if content else None
            return answer.status, dict(answer.headers.items()), content
        finally:
            connection.close()

    def submit(self, organization: str = "one", **spec: Any) -> dict[str, Any]:
        """A submitted workload."""
        status, body = self.call(
            "POST",
            "/v1/workloads",
            {"spec": {"name": "w", "run": "true"} | spec},
            token=self.token("submitter", organization),
        )
        assert status == 201, body
        return dict(body)

    def launched(self, job_id: str, rank: int = 0) -> LaunchSpec:
        """The launch of a job's worker, once the engine has it."""

        def look() -> LaunchSpec | None:
            return next(
                (spec for spec in list(self.engine.specs.values()) if spec.job_id == job_id and spec.rank == rank), None
            )

        found: LaunchSpec = eventually(look, what=f"launch of {job_id}")
        return found

    def report(self, launch: LaunchSpec, *events: dict[str, Any]) -> tuple[int, Any]:
        """What the control plane answers to a runner's report."""
        return self.call(
            "POST",
            f"/v1/runners/{launch.launch_id}/report",
            {"fence": launch.fence, "events": [{"at_ns": time.time_ns(), **event} for event in events]},
            token=launch.runner_token,
        )

    def write_log(self, launch: LaunchSpec, offset: int, data: bytes, *, complete: bool = False) -> tuple[int, Any]:
        """What the control plane answers to a piece of a log."""
        path = f"/v1/runners/{launch.launch_id}/logs?offset={offset}" + ("&complete=1" if complete else "")
        return self.call("POST", path, raw=data, token=launch.runner_token)

    def running(self, **spec: Any) -> tuple[str, LaunchSpec]:
        """A job that runs, and the launch of its first worker."""
        job_id = self.submit(**spec)["jobs"][0]["id"]
        launch = self.launched(job_id)
        assert self.report(launch, {"type": "prepared"}, {"type": "started"})[0] == 200
        return job_id, launch


class Events:
    """A stream of server-sent events."""

    def __init__(self, peer: Peer, path: str, *, last_id: str = "", token: str | None = None) -> None:
        self._connection = peer.connect()
        headers = {"Authorization": f"Bearer {token or peer.token()}", "Accept": "text/event-stream"}
        if last_id:
            headers["Last-Event-ID"] = last_id
        self._connection.request("GET", path, headers=headers)
        self.response = self._connection.getresponse()
        assert self.response.status == 200, self.response.read()

    def __iter__(self) -> Iterator[tuple[str, Any, str]]:
        """(type, data, id) of each."""
        fields: dict[str, str] = {}
        while line := self.response.readline():
            text = line.decode().rstrip("\n")
            if text:
                name, _, value = text.partition(":")
                fields[name] = value.removeprefix(" ")
            elif "event" in fields:
                yield fields["event"], json.loads(fields["data"]), fields.get("id", "")
                fields = {}
            else:
                fields = {}

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._connection.sock is not None:
                self._connection.sock.shutdown(socket.SHUT_RDWR)
        self.response.close()
        self._connection.close()
