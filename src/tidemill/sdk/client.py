"""The client: one method per verb, synchronous, with values of ``tidemill.sdk.results``.

A *ref* is a job's id, the beginning of one that is unique, or a workload's name (its newest job).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self, TypeVar

from tidemill.errors import InvalidRequest, NotFound, Unavailable
from tidemill.model.registry import parse_model_reference
from tidemill.sdk import connection
from tidemill.sdk.results import (
    ArtifactInfo,
    DataSetInfo,
    Event,
    ExecResult,
    GuardDecision,
    Job,
    ModelInfo,
    ModelVersionInfo,
    NodeInfo,
    ProjectInfo,
    QueuedJob,
    QueueInfo,
    Quote,
    Receipt,
    Record,
    Replica,
    RequestUsage,
    ReservationInfo,
    Revisions,
    Share,
    SiteInfo,
    Status,
    Stranger,
    TokenInfo,
    VolumeInfo,
    Why,
    Workload,
)
from tidemill.sdk.transport import OnRetry, Transport, segment

if TYPE_CHECKING:
    from tidemill.sdk.execs import ExecSession
    from tidemill.sdk.specfile import SpecFile
    from tidemill.sdk.streams import LogFollower
    from tidemill.sdk.workdir import Progress

R = TypeVar("R", bound=Record)
RECONNECT_FOR_S = 300.0
"""How long a followed log waits for a control plane that is away; the job goes on meanwhile."""
_LOOK_AGAIN_S = 0.25
_ADDING_S = 3_600.0
"""How long it may take to look at the files of a model."""
_HEX = frozenset("0123456789abcdef")


class Client:
    """A connection to a control plane.

    Without arguments: ``TIDEMILL_API_URL`` and ``TIDEMILL_TOKEN``, else the control plane that ``tidemill up``
    started here. When that one does not answer, the others of ``TIDEMILL_API_URLS`` are asked. Methods raise
    ``TidemillError`` and its subclasses. Use as a context manager, or ``close()``.
    """

    def __init__(
        self,
        url: str | None = None,
        token: str | None = None,
        project: str | None = None,
        *,
        retry_for_s: float = 5.0,
        on_retry: OnRetry | None = None,
    ) -> None:
        """Raises: Unavailable when no control plane is known, Unauthorized when there is no token for it."""
        found = connection.find(url, token)
        self.project = project or ""
        self.is_local = found.is_local
        self._http = Transport(
            found.url, found.token, others=found.others, ca=found.ca, retry_for_s=retry_for_s, on_retry=on_retry
        )

    @property
    def url(self) -> str:
        """The address of the control plane that is asked next."""
        return self._http.url

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of connections; harmless twice."""
        self._http.close()

    # --- submitting ---

    def submit(
        self,
        spec: Mapping[str, Any] | str | Path | SpecFile,
        *,
        workdir: str | Path | None = None,
        progress: Progress | None = None,
    ) -> Workload:
        """The workload made from a mapping, a YAML file's path or a ``SpecFile``.

        Its ``workdir`` (relative to the file's folder, or to the current one) is uploaded when it is not there yet.
        """
        body = self._complete(spec, workdir, progress)
        return Workload.from_json(self._http.post("/v1/workloads", self._with_project({"spec": body})))

    def submit_batch(self, specs: Sequence[Mapping[str, Any]]) -> tuple[Workload, ...]:
        """The workloads made from up to 1000 specs: all of them or none."""
        body = {"specs": [self._complete(spec, None, None) for spec in specs]}
        answer = self._http.post("/v1/workloads:batch", self._with_project(body))
        return tuple(Workload.from_json(item) for item in answer["items"])

    def run(
        self,
        spec: Mapping[str, Any] | str | Path | SpecFile,
        *,
        workdir: str | Path | None = None,
        timeout_s: float | None = None,
    ) -> Job:
        """The first job of a submitted workload, after it ended."""
        workload = self.submit(spec, workdir=workdir)
        return self.wait(workload.jobs[0].id, timeout_s=timeout_s)

    def quote(self, spec: Mapping[str, Any] | str | Path | SpecFile) -> Quote:
        """What it would be to submit this: whether and where it would start, and an estimate of its cost."""
        plain = dict(_mapping(spec)[0])
        if not _is_digest(plain.get("workdir")):
            plain.pop("workdir", None)  # nothing about it changes with what is in the folder
        return Quote.from_json(self._http.post("/v1/quotes", self._with_project({"spec": plain})))

    def upload_workdir(self, folder: str | Path, *, progress: Progress | None = None) -> str:
        """The digest under which a folder's content is stored; it is sent only when it is missing there."""
        from tempfile import SpooledTemporaryFile

        from tidemill.sdk.workdir import pack

        with SpooledTemporaryFile(max_size=16 << 20) as spool:
            packed = pack(Path(folder), spool, progress=progress)
            path = f"/v1/blobs/{packed.digest}"
            try:
                self._http.call("HEAD", path)
            except NotFound:
                self._http.call(
                    "PUT",
                    path,
                    content=lambda: _Unclosed(spool),
                    headers={"Content-Type": "application/gzip", "Content-Length": str(packed.size)},
                    timeout_s=600.0,
                )
        return packed.digest

    # --- jobs and workloads ---

    def jobs(
        self,
        *,
        state: str = "",
        kind: str = "",
        name: str = "",
        workload: str = "",
        limit: int = 0,
    ) -> Iterator[Job]:
        """Jobs, newest first; ``state`` may list several with commas. All of them when ``limit`` is zero."""
        query = {"state": state, "kind": kind, "name": name, "workload": workload, "project": self.project}
        return self._list("/v1/jobs", Job, query, limit=limit)

    def job(self, ref: str) -> Job:
        """One job with its attempts and workers."""
        return Job.from_json(self._http.get(f"/v1/jobs/{segment(ref)}", project=self.project))

    def workload(self, ref: str) -> Workload:
        """One workload with its jobs."""
        return Workload.from_json(self._http.get(f"/v1/workloads/{segment(ref)}", project=self.project))

    def stop(self, ref: str) -> Job:
        """The job, asked to end: its workers are signalled, and killed after their grace."""
        return Job.from_json(self._http.post(f"/v1/jobs/{segment(ref)}/stop", project=self.project))

    def stop_workload(self, ref: str) -> Workload:
        """The workload, all jobs of which are asked to end."""
        return Workload.from_json(self._http.post(f"/v1/workloads/{segment(ref)}/stop", project=self.project))

    def update(
        self,
        ref: str,
        spec: Mapping[str, Any] | str | Path | SpecFile,
        *,
        workdir: str | Path | None = None,
        progress: Progress | None = None,
        restart: bool = False,
    ) -> Workload:
        """The new revision of a service that runs, which takes its place replica by replica; no request fails.

        ``restart`` exchanges the replicas also where nothing is different.
        """
        body = {"spec": self._complete(spec, workdir, progress), "restart": restart}
        return Workload.from_json(self._http.post(f"/v1/workloads/{segment(ref)}/update", self._with_project(body)))

    def revisions(self, ref: str) -> Revisions:
        """The revisions of a service, newest first, and how far the rollout is that is under way."""
        return Revisions.from_json(self._http.get(f"/v1/workloads/{segment(ref)}/revisions", project=self.project))

    def promote(self, ref: str, *, everything: bool = False) -> Revisions:
        """The revisions, after a canary has gone to its next step, or to the whole service."""
        path = f"/v1/workloads/{segment(ref)}/promote"
        return Revisions.from_json(self._http.post(path, {"all": everything}, project=self.project))

    def abort(self, ref: str) -> Revisions:
        """The revisions, while the one before takes the place again of the one that was being rolled out."""
        return Revisions.from_json(self._http.post(f"/v1/workloads/{segment(ref)}/abort", project=self.project))

    def rollback(self, ref: str, revision: int = 0) -> Revisions:
        """The revisions, while an earlier one takes its place again; 0: the one before."""
        path = f"/v1/workloads/{segment(ref)}/rollback"
        return Revisions.from_json(self._http.post(path, {"revision": revision}, project=self.project))

    def wait(
        self,
        ref: str,
        *,
        until: Callable[[Job], bool] | None = None,
        timeout_s: float | None = None,
        on_update: Callable[[Job], None] | None = None,
    ) -> Job:
        """The job once it ended, or once ``until`` holds for it, whichever is first.

        Raises: Unavailable when ``timeout_s`` pass first.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        pause = 0.05
        while True:
            job = self.job(ref)
            if on_update is not None:
                on_update(job)
            if job.is_terminal or (until is not None and until(job)):
                return job
            if deadline is not None and time.monotonic() + pause > deadline:
                raise Unavailable(f"{job.name} is {job.state} after {timeout_s:g} s", job=job)
            time.sleep(pause)
            pause = min(pause * 1.3, 1.0)

    def logs(
        self,
        ref: str,
        *,
        rank: int | None = None,
        attempt: int | None = None,
        tail: int | None = None,
        follow: bool = True,
        on_retry: OnRetry | None = None,
    ) -> LogFollower:
        """``LogChunk`` and ``JobUpdate`` values in order; without ``follow``, what there is now.

        A connection that breaks is made again without a gap or a repeat, for up to ``RECONNECT_FOR_S``.
        """
        from tidemill.sdk.streams import follow_log

        query = {"rank": rank, "attempt": attempt, "tail": tail, "follow": follow, "project": self.project}
        path = f"/v1/jobs/{segment(ref)}/logs"
        return follow_log(self._http, path, query=query, give_up_s=RECONNECT_FOR_S, on_retry=on_retry)

    def request_usages(self) -> Iterator[RequestUsage]:
        """What each request to a model of the project took, in the order in which they were entered."""
        return self._list("/v1/ledger/tokens", RequestUsage, {"project": self.project} if self.project else {})

    def why(self, ref: str) -> Why:
        """Why a job is where it is."""
        return Why.from_json(self._http.get(f"/v1/jobs/{segment(ref)}/why", project=self.project))

    def checkpointed(self, ref: str, detail: str = "") -> None:
        """Say that the job's work up to now is safe; only with the token that the running job has itself."""
        self._http.post(f"/v1/jobs/{segment(ref)}/checkpoint", {"detail": detail})

    def receipt(self, ref: str) -> Receipt:
        """What a job used so far and what that costs."""
        return Receipt.from_json(self._http.get(f"/v1/jobs/{segment(ref)}/receipt", project=self.project))

    # --- inside a job ---

    def exec_session(
        self,
        ref: str,
        command: Sequence[str],
        *,
        rank: int = 0,
        tty: bool = False,
        rows: int = 24,
        cols: int = 80,
        env: Mapping[str, str] | None = None,
    ) -> ExecSession:
        """A started command inside a worker, to talk to."""
        from tidemill.sdk.execs import ExecSession

        body = {
            "command": list(command),
            "rank": rank,
            "tty": tty,
            "rows": rows,
            "cols": cols,
            "env": dict(env or {}),
        }
        answer = self._http.post(f"/v1/jobs/{segment(ref)}/exec", body, project=self.project)
        return ExecSession(self._http, answer["exec_id"])

    def exec(
        self, ref: str, command: Sequence[str], *, rank: int = 0, stdin: bytes | Iterable[bytes] = b""
    ) -> ExecResult:
        """How a command inside a worker ended, with what it wrote."""
        wrote: dict[bytes, list[bytes]] = {b"o": [], b"e": []}
        with self.exec_session(ref, command, rank=rank) as session:
            session.feed([stdin] if isinstance(stdin, bytes) else stdin)
            for kind, octets in session:
                wrote[kind].append(octets)
            return ExecResult(session.exit_code or 0, b"".join(wrote[b"o"]), b"".join(wrote[b"e"]))

    def copy_from(self, ref: str, path: str, to: str | Path, *, rank: int = 0) -> list[Path]:
        """The files written at ``to``; see ``tidemill.sdk.copying`` for what ``path`` may be."""
        from tidemill.sdk.copying import copy_from

        return copy_from(self, ref, path, Path(to), rank=rank)

    def copy_to(self, ref: str, source: str | Path, path: str, *, rank: int = 0) -> None:
        """Put a file or folder of this machine into a running worker."""
        from tidemill.sdk.copying import copy_to

        copy_to(self, ref, Path(source), path, rank=rank)

    def outputs(self, ref: str, path: str = "") -> Iterable[bytes]:
        """The tar archive of what is at ``path`` in the job's output folder, in pieces; also after it ended."""
        return self._http.open("GET", f"/v1/jobs/{segment(ref)}/outputs", query={"path": path, "project": self.project})

    # --- the cloud ---

    def status(self) -> Status:
        """The state of the cloud."""
        return Status.from_json(self._http.get("/v1/status"))

    def health(self) -> Mapping[str, Any]:
        """``{"status": "ok", "version": …}``; needs no token."""
        answer: Mapping[str, Any] = self._http.get("/v1/healthz")
        return answer

    def nodes(self) -> tuple[NodeInfo, ...]:
        """The machines."""
        return tuple(self._list("/v1/nodes", NodeInfo, {}))

    def cordon(self, node: str, reason: str = "") -> NodeInfo:
        """The machine, on which nothing new is placed from now on."""
        return self._mark(node, "cordon", reason)

    def drain(self, node: str, reason: str = "") -> NodeInfo:
        """The machine, which what runs there leaves, with its checkpoint grace, to queue again."""
        return self._mark(node, "drain", reason)

    def resume(self, node: str, reason: str = "") -> NodeInfo:
        """The machine, open to work again; what its devices were failing of is forgotten."""
        return self._mark(node, "resume", reason)

    def replicas(self) -> tuple[Replica, ...]:
        """The control planes that stand in for each other, the one that leads first; none where there is only one."""
        return tuple(self._list("/v1/replicas", Replica, {}))

    def strangers(self) -> tuple[Stranger, ...]:
        """Launches that the engine has and the database has never heard of."""
        return tuple(self._list("/v1/strangers", Stranger, {}))

    def end_stranger(self, launch: str, *, grace_s: float = 30) -> Stranger:
        """The launch, which is stopped with that grace and then forgotten."""
        path = f"/v1/strangers/{segment(launch)}/stop"
        return Stranger.from_json(self._http.post(path, {}, grace=grace_s))

    def _mark(self, node: str, marking: str, reason: str) -> NodeInfo:
        path = f"/v1/nodes/{segment(node)}/mark"
        return NodeInfo.from_json(self._http.post(path, {"marking": marking, "reason": reason}))

    # --- sharing ---

    def queue(self, *, limit: int = 100) -> tuple[QueuedJob, ...]:
        """Waiting jobs in the order in which they would be tried."""
        page = self._http.get("/v1/queue", project=self.project, limit=limit)
        return tuple(QueuedJob.from_json(item) for item in page["items"])

    def share(self) -> tuple[Share, ...]:
        """Who has what, parents before their children."""
        return tuple(Share.from_json(item) for item in self._http.get("/v1/share")["items"])

    def queues(self) -> tuple[QueueInfo, ...]:
        """The places in the quota tree, by name."""
        return tuple(QueueInfo.from_json(item) for item in self._http.get("/v1/queues")["items"])

    def set_queues(self, queues: Sequence[Mapping[str, Any]]) -> tuple[QueueInfo, ...]:
        """All places in the quota tree after these were set, all of them or none; others stay as they are."""
        answer = self._http.call("PUT", "/v1/queues", body={"queues": [dict(queue) for queue in queues]}).json()
        return tuple(QueueInfo.from_json(item) for item in answer["items"])

    def set_queue(self, name: str, **changes: Any) -> QueueInfo:
        """The place of that name with ``changes`` (fields of ``QueueInfo``), made when there was none."""
        before = next((queue.to_json() for queue in self.queues() if queue.name == name), {"name": name})
        path = f"/v1/queues/{segment(name)}"
        return QueueInfo.from_json(self._http.call("PUT", path, body={**before, **changes}).json())

    def reservations(self) -> tuple[ReservationInfo, ...]:
        """Reservations with a window to come, the earliest first."""
        return tuple(ReservationInfo.from_json(item) for item in self._http.get("/v1/reservations")["items"])

    def reserve(
        self,
        name: str,
        *,
        start: str,
        duration: str | int,
        nodes: int | Sequence[str],
        gpus: str = "",
        labels: Mapping[str, str] | None = None,
        every: str | int = "",
        until: str = "",
        maintenance: bool = False,
    ) -> ReservationInfo:
        """A new reservation of so many machines, or of those named; for nobody with ``maintenance``.

        ``start`` and ``until`` are ISO times with their zone, or lengths of time from now such as ``2h``.
        """
        body: dict[str, Any] = {"name": name, "start": start, "duration": duration}
        body |= {"nodes": nodes} if isinstance(nodes, int) else {"node": list(nodes)}
        optional = {"gpus": gpus, "labels": dict(labels or {}), "every": every, "until": until}
        body |= {field: value for field, value in optional.items() if value}
        if maintenance:
            body["maintenance"] = True
        elif self.project:
            body["project"] = self.project
        return ReservationInfo.from_json(self._http.post("/v1/reservations", body))

    def cancel_reservation(self, name: str) -> ReservationInfo:
        """The reservation of that name or id, which does not stand any more. Raises: NotFound."""
        return ReservationInfo.from_json(self._http.call("DELETE", f"/v1/reservations/{segment(name)}").json())

    def usage(
        self, *, job: str = "", by: Sequence[str] = ("model", "key"), since_ns: int | None = None
    ) -> Mapping[str, Any]:
        """Exact sums over the ledger lines of a job or a project.

        Requests to models, since then, are summed by some of ``model``, ``key``, ``user`` and ``label``.
        """
        answer: Mapping[str, Any] = self._http.get(
            "/v1/usage", job=job, project=self.project, by=",".join(by), since_ns=since_ns
        )
        return answer

    def model_costs(self) -> tuple[Mapping[str, Any], ...]:
        """What a thousand tokens of each model took: its replicas' money and energy over the tokens they answered."""
        return tuple(self._http.get("/v1/usage/models", project=self.project)["items"])

    def decisions(
        self, *, model: str = "", rule: str = "", action: str = "", limit: int = 100
    ) -> tuple[GuardDecision, ...]:
        """What guardrails decided about requests to models, newest first."""
        query = {"project": self.project, "model": model or None, "rule": rule or None, "action": action or None}
        return tuple(self._list("/v1/decisions", GuardDecision, query, limit=limit))

    def events(self, *, after: int = 0, follow: bool = True) -> Iterator[Event]:
        """The event log from ``after`` on; endless with ``follow``."""
        if follow:
            from tidemill.sdk.streams import follow_events

            return follow_events(self._http, after=after, give_up_s=RECONNECT_FOR_S)
        return self._list("/v1/events", Event, {"after": after or None})

    # --- artifacts, secrets, tokens, projects ---

    def artifacts(self) -> tuple[ArtifactInfo, ...]:
        """The project's artifacts by name, newest version first."""
        return tuple(self._list("/v1/artifacts", ArtifactInfo, {"project": self.project}))

    def artifact(self, reference: str) -> ArtifactInfo:
        """One artifact: ``name`` (its newest version) or ``name:version``."""
        return ArtifactInfo.from_json(self._http.get(f"/v1/artifacts/{segment(reference)}", project=self.project))

    def create_artifact(self, name: str, *, job: str, path: str) -> ArtifactInfo:
        """A new version made from ``path`` in a job's output folder."""
        body = self._with_project({"name": name, "job": job, "path": path})
        return ArtifactInfo.from_json(self._http.post("/v1/artifacts", body))

    def artifact_content(self, reference: str) -> Iterable[bytes]:
        """The artifact's archive (tar.gz), in pieces."""
        return self._http.open("GET", f"/v1/artifacts/{segment(reference)}/content", query={"project": self.project})

    def get_artifact(self, reference: str, to: str | Path) -> list[Path]:
        """The files written below the folder ``to``."""
        from tidemill.sdk.copying import extract

        return extract(self.artifact_content(reference), Path(to))

    # --- volumes and data sets ---

    def volumes(self) -> tuple[VolumeInfo, ...]:
        """The project's volumes, by name."""
        return tuple(self._list("/v1/volumes", VolumeInfo, {"project": self.project}))

    def volume(self, name: str) -> VolumeInfo:
        """One volume. Raises: NotFound."""
        return VolumeInfo.from_json(self._http.get(f"/v1/volumes/{segment(name)}", project=self.project))

    def create_volume(
        self, name: str, path: str, *, site: str = "", node: str = "", read_only: bool = False
    ) -> VolumeInfo:
        """A folder of a site under a name, by which jobs have it mounted; harmless to repeat."""
        body = {"name": name, "path": path, "site": site, "node": node, "read_only": read_only}
        return VolumeInfo.from_json(self._http.post("/v1/volumes", self._with_project(body)))

    def delete_volume(self, name: str) -> VolumeInfo:
        """The volume that was; its files stay. Raises: NotFound, Conflict while jobs use it."""
        query = {"project": self.project}
        return VolumeInfo.from_json(self._http.call("DELETE", f"/v1/volumes/{segment(name)}", query=query).json())

    def datasets(self) -> tuple[DataSetInfo, ...]:
        """The project's data sets, by name, newest version first."""
        return tuple(self._list("/v1/datasets", DataSetInfo, {"project": self.project}))

    def dataset(self, reference: str) -> DataSetInfo:
        """One data set: ``name`` (its newest version) or ``name:version``. Raises: NotFound."""
        return DataSetInfo.from_json(self._http.get(f"/v1/datasets/{segment(reference)}", project=self.project))

    def manifest(self, reference: str) -> bytes:
        """The list of a data set's files, as ``tidemill.model.storage.read_manifest`` reads it."""
        path = f"/v1/datasets/{segment(reference)}/manifest"
        return b"".join(self._http.open("GET", path, query={"project": self.project}))

    def add_dataset(
        self,
        name: str,
        home: str | Path,
        *,
        site: str = "",
        node: str = "",
        endpoint: str = "",
        region: str = "",
        secret: str = "",
        progress: Progress | None = None,
    ) -> DataSetInfo:
        """A version of a data set: a folder, which is read here, or ``s3://bucket/prefix``, which is read over there.

        What is in S3 is in state ``scanning`` at first; see ``await_dataset``.
        """
        body: dict[str, Any] = {"name": name, "home": str(home)}
        if str(home).startswith("s3://"):
            body |= {"endpoint": endpoint, "region": region, "secret": secret}
            body |= {key: value for key, value in (("site", site), ("node", node)) if value}
        else:
            from tidemill.sdk.datasets import manifest_of_folder

            folder = Path(home).expanduser().absolute()
            content = manifest_of_folder(folder, progress=progress)
            body |= {"home": str(folder), "site": site, "node": node, "manifest": self._upload(content)}
            body |= {
                key: value for key, value in (("endpoint", endpoint), ("region", region), ("secret", secret)) if value
            }
        return DataSetInfo.from_json(self._http.post("/v1/datasets", self._with_project(body)))

    def await_dataset(self, reference: str, *, told: Callable[[DataSetInfo], object] = lambda _: None) -> DataSetInfo:
        """The data set, once nobody reads it for its content. ``told`` is called with it while that goes on."""
        while (found := self.dataset(reference)).state == "scanning":
            told(found)
            time.sleep(_LOOK_AGAIN_S)
        return found

    def verify_dataset(self, reference: str, *, progress: Progress | None = None) -> str:
        """What is different at its home now, in a sentence; empty when all is as it was.

        A folder is read here, S3 over there. Raises: NotFound, also when this machine does not have the folder.
        """
        found = self.dataset(reference)
        version = f"{found.name}:{found.version}"
        if not found.home.startswith("s3://"):
            from tidemill.sdk.datasets import changes_of_folder

            return changes_of_folder(Path(found.home), self.manifest(version), progress=progress)
        self._http.post(f"/v1/datasets/{segment(version)}/verify", project=self.project)
        return self.await_dataset(version).detail

    def delete_dataset(self, reference: str) -> DataSetInfo:
        """The version that was deleted; its files stay. Raises: NotFound, Conflict while jobs use it."""
        query = {"project": self.project}
        return DataSetInfo.from_json(
            self._http.call("DELETE", f"/v1/datasets/{segment(reference)}", query=query).json()
        )

    # --- the model registry ---

    def models(self) -> tuple[ModelInfo, ...]:
        """The project's models, by name."""
        return tuple(self._list("/v1/models", ModelInfo, {"project": self.project}))

    def model(self, name: str) -> ModelInfo:
        """One model. Raises: NotFound."""
        return ModelInfo.from_json(self._http.get(f"/v1/models/{segment(name)}", project=self.project))

    def model_versions(self, name: str) -> tuple[ModelVersionInfo, ...]:
        """A model's versions, newest first."""
        path = f"/v1/models/{segment(name)}/versions"
        return tuple(self._list(path, ModelVersionInfo, {"project": self.project}))

    def model_version(self, reference: str) -> ModelVersionInfo:
        """The version that is meant by ``NAME``, ``NAME:VERSION``, ``NAME:STAGE``, ``NAME@ALIAS``, or by
        ``models:/NAME/VERSION`` and the like. Raises: NotFound, InvalidRequest."""
        return ModelVersionInfo.from_json(self._http.get(version_path(reference), project=self.project))

    def job_models(self, job: str) -> tuple[ModelVersionInfo, ...]:
        """The versions of models that a job made, oldest first."""
        return tuple(self._list(f"/v1/jobs/{segment(job)}/models", ModelVersionInfo, {"project": self.project}))

    def push_model(
        self,
        name: str,
        source: str | Path | None = None,
        *,
        job: str = "",
        path: str = "",
        artifact: str = "",
        allow_pickles: bool = False,
        description: str = "",
        tags: Mapping[str, str] | None = None,
        metrics: Mapping[str, object] | None = None,
        base_model: str = "",
        licence: str = "",
        framework: str = "",
        commit: str = "",
        progress: Progress | None = None,
    ) -> ModelVersionInfo:
        """A new version of a model: a file or folder of this machine, ``path`` in a job's output, or an artifact.

        Files are read and looked at here first, and sent when the project does not have them yet; inside a job, that
        job is noted as the maker. The newest version comes back when it has the same files. ``progress`` gets bytes
        done and in all. Raises: InvalidRequest that names each file that is broken, or a pickle; Forbidden.
        """
        body: dict[str, Any] = {"allow_pickles": allow_pickles, "description": description, "tags": dict(tags or {})}
        body |= {"metrics": {key: str(value) for key, value in (metrics or {}).items()}}
        body |= {"base_model": base_model, "licence": licence, "framework": framework, "commit": commit, "job": job}
        if source is not None:
            from tidemill.sdk.models import send_files

            body["files"] = send_files(
                self._http, Path(source), self.project, allow_pickles=allow_pickles, progress=progress
            )
        else:
            body |= {"path": path, "artifact": artifact}
        answer = self._http.call(
            "POST", f"/v1/models/{segment(name)}/versions", body=self._with_project(body), timeout_s=_ADDING_S
        )
        return ModelVersionInfo.from_json(answer.json())

    def pull_model(self, reference: str, to: str | Path, *, progress: Progress | None = None) -> list[Path]:
        """The files of a version, written below ``to``: each is there whole and checked, or not at all; what is there
        already is not fetched again, and what broke off goes on where it was."""
        from tidemill.sdk.models import fetch_files

        found = self.model_version(reference)
        return fetch_files(self._http, found, Path(to), self.project, progress=progress)

    def promote_model(self, reference: str, stage: str, *, why: str = "") -> ModelVersionInfo:
        """The version, now in that stage: ``none``, ``staging``, ``production`` or ``archived``."""
        body = {"stage": stage, "why": why}
        answer = self._http.post(f"{version_path(reference)}/stage", body, project=self.project)
        return ModelVersionInfo.from_json(answer)

    def alias_model(self, reference: str, alias: str, *, why: str = "") -> ModelVersionInfo:
        """The version, to which the alias points now, and to no other."""
        found = self.model_version(reference)
        path = f"/v1/models/{segment(found.name)}/aliases/{segment(alias)}"
        body = {"version": found.version, "why": why}
        answer = self._http.call("PUT", path, body=body, query={"project": self.project}).json()
        return ModelVersionInfo.from_json(answer)

    def unalias_model(self, name: str, alias: str) -> ModelInfo:
        """The model without that alias."""
        path = f"/v1/models/{segment(name)}/aliases/{segment(alias)}"
        return ModelInfo.from_json(self._http.call("DELETE", path, query={"project": self.project}).json())

    def describe_model(
        self, reference: str, *, description: str | None = None, tags: Mapping[str, str | None] | None = None
    ) -> ModelVersionInfo:
        """The version with another description and these tags; one that is None goes."""
        body = {"description": description, "tags": dict(tags or {})}
        answer = self._http.call("PATCH", version_path(reference), body=body, query={"project": self.project}).json()
        return ModelVersionInfo.from_json(answer)

    def delete_model_version(self, reference: str) -> ModelVersionInfo:
        """The version that was. Raises: Conflict while it is in staging or production, has an alias, or is used."""
        answer = self._http.call("DELETE", version_path(reference), query={"project": self.project}).json()
        return ModelVersionInfo.from_json(answer)

    def delete_model(self, name: str) -> ModelInfo:
        """The model that was, with all its versions. Raises: as ``delete_model_version``."""
        answer = self._http.call("DELETE", f"/v1/models/{segment(name)}", query={"project": self.project}).json()
        return ModelInfo.from_json(answer)

    def model_policy(self, pickles: str = "") -> str:
        """``allow`` or ``refuse``: whether the project's models may have pickles; set when it is given."""
        query = {"project": self.project}
        if pickles:
            answer = self._http.call("PUT", "/v1/model-policy", body={"pickles": pickles}, query=query).json()
        else:
            answer = self._http.get("/v1/model-policy", **query)
        return str(answer["pickles"])

    def _upload(self, content: bytes) -> str:
        """The digest under which these octets are stored."""
        digest = hashlib.sha256(content).hexdigest()
        path = f"/v1/blobs/{digest}"
        try:
            self._http.call("HEAD", path)
        except NotFound:
            self._http.call(
                "PUT",
                path,
                content=content,
                headers={"Content-Type": "application/octet-stream"},
                timeout_s=600.0,
            )
        return digest

    def secrets(self) -> tuple[str, ...]:
        """The names of the project's secrets."""
        items = self._http.get("/v1/secrets", project=self.project)["items"]
        return tuple(item["name"] if isinstance(item, Mapping) else str(item) for item in items)

    def put_secret(self, name: str, value: str) -> None:
        """Store a secret, or replace its value."""
        path = f"/v1/secrets/{segment(name)}"
        self._http.call("PUT", path, body={"value": value}, query={"project": self.project})

    def delete_secret(self, name: str) -> None:
        """Raises: NotFound when there is none."""
        self._http.call("DELETE", f"/v1/secrets/{segment(name)}", query={"project": self.project})

    def tokens(self) -> tuple[TokenInfo, ...]:
        """The tokens of the organization, without their secret part."""
        return tuple(self._list("/v1/tokens", TokenInfo, {}))

    def create_token(
        self,
        name: str,
        *,
        scopes: Sequence[str],
        project: str = "",
        expires_in: str = "",
        models: Sequence[str] = (),
        limits: Mapping[str, float] | None = None,
        priority: str = "normal",
        label: str = "",
    ) -> TokenInfo:
        """A new token; its ``token`` is shown in this answer only.

        ``models`` are names or patterns of those that it may ask, none: all; ``limits`` maps names such as
        ``requests/minute`` or ``usd/month`` to amounts.
        """
        body: dict[str, Any] = {"name": name, "scopes": list(scopes)}
        body |= {"models": list(models), "limits": dict(limits or {}), "priority": priority, "label": label}
        if project or self.project:
            body["project"] = project or self.project
        if expires_in:
            body["expires_in"] = expires_in
        return TokenInfo.from_json(self._http.post("/v1/tokens", body))

    def change_token(
        self,
        token_id: str,
        *,
        models: Sequence[str] | None = None,
        limits: Mapping[str, float] | None = None,
        priority: str | None = None,
        label: str | None = None,
    ) -> TokenInfo:
        """The token, with something else to say of requests to models; what is None stays as it is."""
        given = {
            "models": None if models is None else list(models),
            "limits": None if limits is None else dict(limits),
            "priority": priority,
            "label": label,
        }
        body = {name: value for name, value in given.items() if value is not None}
        return TokenInfo.from_json(self._http.call("PUT", f"/v1/tokens/{segment(token_id)}", body=body).json())

    def revoke_token(self, token_id: str) -> None:
        """Make a token worthless."""
        self._http.call("DELETE", f"/v1/tokens/{segment(token_id)}")

    def sites(self) -> tuple[SiteInfo, ...]:
        """The places where work runs."""
        return tuple(self._list("/v1/sites", SiteInfo, {}))

    def put_site(self, name: str, **described: Any) -> SiteInfo:
        """The site as described by ``kind``, ``engine``, ``country``, ``pue``, ``carbon_g_per_kwh``,
        ``carbon_by_hour``, ``lease``, ``prices`` and ``tariff``; what is left out stays as it is."""
        given = {key: value for key, value in described.items() if value is not None}
        return SiteInfo.from_json(self._http.call("PUT", f"/v1/sites/{segment(name)}", body=given).json())

    def link_sites(self, one: str, other: str, *, latency: str = "0s", bandwidth: str = "") -> SiteInfo:
        """The first of two sites, with how far the other is from it and how much gets through."""
        body = {"latency": latency, "bandwidth": bandwidth}
        answer = self._http.call("PUT", f"/v1/sites/{segment(one)}/links/{segment(other)}", body=body)
        return SiteInfo.from_json(answer.json())

    def unlink_sites(self, one: str, other: str) -> SiteInfo:
        """The first of two sites, the way between which is not known any more."""
        return SiteInfo.from_json(self._http.call("DELETE", f"/v1/sites/{segment(one)}/links/{segment(other)}").json())

    def rentals(self) -> dict[str, Any]:
        """``items``, the machines; ``spent_micro`` this month; ``not_rented``, jobs with why not; ``problem``."""
        return dict(self._http.get("/v1/rentals"))

    def joining_token(self, site: str, *, expires_in: str = "1h") -> dict[str, Any]:
        """``token``, with which machines join that site, shown this once; ``site`` and ``expires_at_ns``."""
        return dict(self._http.post(f"/v1/sites/{segment(site)}/tokens", {"expires_in": expires_in}))

    def remove_outpost(self, outpost: str) -> dict[str, Any]:
        """``left`` once nothing runs on the outpost's machines, which are drained; until then what is ``running``."""
        return dict(self._http.call("DELETE", f"/v1/outposts/{segment(outpost)}").json())

    def declare_lost(self, node: str) -> NodeInfo:
        """The silent machine, which is taken to be gone for good."""
        return NodeInfo.from_json(self._http.post(f"/v1/nodes/{segment(node)}/lost", {}))

    def projects(self) -> tuple[ProjectInfo, ...]:
        """The organization's projects."""
        return tuple(self._list("/v1/projects", ProjectInfo, {}))

    def create_project(
        self,
        name: str,
        *,
        limit_gpu_milli: int = 0,
        limit_cpu_milli: int = 0,
        limits: Mapping[str, float] | None = None,
        countries: Sequence[str] | None = None,
    ) -> ProjectInfo:
        """A new project, or the one of that name with these limits; zero does not limit what its jobs hold.

        ``limits`` maps names such as ``tokens/day`` to what its keys may ask of models. ``countries`` are where its
        work runs and its requests are answered, none: anywhere. None leaves either as it is.
        """
        body: dict[str, Any] = {
            "name": name,
            "limit_gpu_milli": limit_gpu_milli,
            "limit_cpu_milli": limit_cpu_milli,
        }
        if limits is not None:
            body["limits"] = dict(limits)
        if countries is not None:
            body["countries"] = list(countries)
        return ProjectInfo.from_json(self._http.post("/v1/projects", body))

    def _list(self, path: str, kind: type[R], query: Mapping[str, Any], *, limit: int = 0) -> Iterator[R]:
        cursor, given = "", 0
        while True:
            size = min(200, limit - given) if limit else 200
            page = self._http.get(path, **query, cursor=cursor, limit=size)
            for item in page["items"]:
                yield kind.from_json(item)
                given += 1
                if limit and given >= limit:
                    return
            cursor = page.get("next_cursor") or ""
            if not cursor:
                return

    def _with_project(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**body, "project": self.project} if self.project else body

    def _complete(
        self,
        spec: Mapping[str, Any] | str | Path | SpecFile,
        workdir: str | Path | None,
        progress: Progress | None,
    ) -> dict[str, Any]:
        """The spec with its folder uploaded and replaced by the digest."""
        plain, folder = _mapping(spec)
        asked = workdir if workdir is not None else plain.get("workdir")
        if not asked or _is_digest(asked):
            return dict(plain)
        base = Path() if workdir is not None else folder
        return {**plain, "workdir": self.upload_workdir(base / Path(asked).expanduser(), progress=progress)}


class _Unclosed:
    """A file from its beginning, which closing leaves open: a body that can be sent again."""

    def __init__(self, file: IO[bytes]) -> None:
        file.seek(0)
        self._file = file

    def read(self, size: int = -1, /) -> bytes:
        """Up to ``size`` octets."""
        return self._file.read(size)

    def close(self) -> None:
        """Do nothing."""


def _mapping(spec: Mapping[str, Any] | str | Path | SpecFile) -> tuple[Mapping[str, Any], Path]:
    """The spec as a mapping and the folder that its paths are relative to."""
    if isinstance(spec, Mapping):
        return spec, Path()
    if isinstance(spec, str | Path):
        from tidemill.sdk.specfile import load

        spec = load(Path(spec))
    return spec.spec, spec.folder


def _is_digest(text: Any) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= _HEX


def version_path(reference: str) -> str:
    """The address of the version of a model that is meant. Raises: InvalidRequest when that is no reference."""
    try:
        meant = parse_model_reference(reference)
    except ValueError as error:
        mend = "Write NAME, NAME:VERSION, NAME@ALIAS or models:/NAME/STAGE."
        raise InvalidRequest(f"{error}.", field="model", value=reference[:100], mend=mend) from error
    which = f"@{meant.alias}" if meant.alias else meant.stage.value if meant.stage else str(meant.number or "latest")
    return f"/v1/models/{segment(meant.name)}/versions/{segment(which)}"
