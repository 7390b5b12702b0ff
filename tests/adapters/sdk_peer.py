"""A control plane that is only its HTTP contract: what the client and the command line are tested against."""

from __future__ import annotations

import io
import json
import re
import socket
import struct
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "tm_user_test"
JOB_ID = "job_06abc-0"


def job_json(**changes: Any) -> dict[str, Any]:
    """A job as the control plane writes it, with a field that no client knows yet."""
    return {
        "id": JOB_ID,
        "workload_id": "wl_06abc",
        "name": "hello",
        "kind": "task",
        "project": "default",
        "index": 0,
        "state": "running",
        "cause": "",
        "detail": "",
        "exit_code": None,
        "priority": 0,
        "submitted_at_ns": 1_000_000_000,
        "first_started_at_ns": 2_000_000_000,
        "started_at_ns": 2_000_000_000,
        "ended_at_ns": 0,
        "attempts": 1,
        "retries": 0,
        "nodes": 1,
        "resources": {"gpus": "none", "cpus": 1},
        "labels": {"team": "a"},
        "reason": None,
        "endpoint": "",
        "from_the_future": {"a": 1},
    } | changes


DONE = {"state": "succeeded", "exit_code": 0, "ended_at_ns": 3_000_000_000}


@dataclass
class LogScript:
    """What a followed log sends: the whole of each rank's text in pieces, cut off where ``cuts`` say."""

    texts: dict[int, str]
    piece: int = 7
    cuts: list[int] = field(default_factory=list)
    """After how many octets of the n-th answer the connection is broken; the answers after that are whole."""
    end_state: dict[str, Any] = field(default_factory=lambda: dict(DONE))
    ignores_last_id: bool = False
    answers: int = 0

    def octets(self, last_id: str) -> bytes:
        """The stream after ``last_id``, by the contract."""
        ends = dict.fromkeys(self.texts, 0)
        if last_id and not self.ignores_last_id:
            for rank, end in re.findall(r"(\d+)=(\d+)", last_id):
                ends[int(rank)] = int(end)
        events = [_event("job", job_json(nodes=len(self.texts)))]
        raw = {rank: text.encode() for rank, text in self.texts.items()}
        while any(ends[rank] < len(raw[rank]) for rank in raw):
            for rank, whole in raw.items():
                start = ends[rank]
                if start >= len(whole):
                    continue
                stop = min(start + self.piece, len(whole))
                while stop < len(whole) and whole[stop] & 0xC0 == 0x80:  # never inside a character
                    stop += 1
                ends[rank] = stop
                identity = "1:" + ",".join(f"{number}={end}" for number, end in ends.items())
                text = whole[start:stop].decode()
                events.append(_event("log", {"rank": rank, "attempt": 1, "offset": start, "text": text}, identity))
                events.append(b": ping\n\n")
        events.append(_event("job", job_json(nodes=len(self.texts), **self.end_state)))
        events.append(_event("end", {}))
        return b"".join(events)


def _event(name: str, data: Any, identity: str = "") -> bytes:
    lines = [f"event: {name}", f"data: {json.dumps(data)}", *([f"id: {identity}"] if identity else [])]
    return "\n".join(lines).encode() + b"\n\n"


class Peer:
    """The server: answers by ``routes`` ((method, path pattern) -> status, body), and remembers what was asked."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.routes: dict[tuple[str, str], Callable[..., tuple[int, Any]]] = {}
        self.blobs: dict[str, bytes] = {}
        self.failures: list[str] = []
        """For the next requests in turn: ``503``, or ``reset`` to break the connection."""
        self.log = LogScript({0: "hello\n"})
        self.exec_output = [(b"o", b"out"), (b"e", b"err"), (b"x", b"7")]
        self.exec_input = b""
        self.outputs = _tar({"sub/a.txt": b"a", "weights.bin": b"w" * 10})
        self.there = {"model"}
        self.submitted: list[dict[str, Any]] = []
        self.job = job_json()
        self.connections = 0
        peer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                peer.connections += 1
                super().setup()

            def log_message(self, *_: Any) -> None:
                return

            def answer(self) -> None:
                peer._answer(self)

        for verb in ("GET", "POST", "PUT", "DELETE", "HEAD"):
            setattr(Handler, f"do_{verb}", Handler.answer)

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: Any) -> None:
                """Connections are broken on purpose."""

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def sent(self, method: str, path: str) -> list[tuple[dict[str, str], bytes]]:
        """The headers and bodies of such requests so far."""
        return [
            (headers, body)
            for seen, target, headers, body in self.requests
            if seen == method and target.split("?")[0] == path
        ]

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        body = _body(request)
        self.requests.append((request.command, request.path, dict(request.headers), body))
        failure = self.failures.pop(0) if self.failures else ""
        if failure == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.connection.close()
            request.close_connection = True
            return
        if failure:
            _reply(request, int(failure), {"code": "unavailable", "kind": "unavailable", "detail": "busy"})
            return
        split = urlsplit(request.path)
        query = {name: values[-1] for name, values in parse_qs(split.query).items()}
        path = unquote(split.path)
        if path != "/v1/healthz" and request.headers["Authorization"] != f"Bearer {TOKEN}":
            _reply(request, 401, {"code": "unauthorized", "kind": "unauthorized", "detail": "A valid token is needed."})
            return
        for (method, pattern), route in [*self.routes.items(), *self._standard().items()]:
            if method == request.command and (match := re.fullmatch(pattern, path)):
                status, answer = route(request, *match.groups(), query=query, body=body)
                if status:
                    _reply(request, status, answer)
                return
        _reply(request, 404, {"code": "not_found", "kind": "not_found", "detail": f"There is no {path}."})

    def _standard(self) -> dict[tuple[str, str], Callable[..., tuple[int, Any]]]:
        def says(value: Any, status: int = 200) -> Callable[..., tuple[int, Any]]:
            return lambda *_, **__: (status, value)

        def listed(*items: Any) -> Callable[..., tuple[int, Any]]:
            return says({"items": list(items), "next_cursor": ""})

        reason = {
            "code": "NotEnoughFreeGpus",
            "subject": "gpu",
            "needed": "2",
            "available": "1",
            "resolvable_by": "time",
        }
        reason["sentence"] = "2 GPUs are needed, 1 is free."
        artifact = {
            "id": "art_1",
            "name": "gpt",
            "version": 2,
            "digest": "ab",
            "size": 2048,
            "created_at_ns": 1,
            "job": JOB_ID,
        }
        token = {"id": "tok_1", "name": "ci", "display": "tm_user_", "scopes": ["read"], "created_at_ns": 1}
        project = {"id": "prj_1", "name": "vision", "created_at_ns": 1, "limit_gpu_milli": 2000}
        node = {
            "id": "n1", "name": "box", "state": "ready", "cpu_milli": 8000, "free_cpu_milli": 6000,
            "memory_bytes": 2**34, "devices": [], "cpu_model": "x86",
        }  # fmt: skip
        place = {
            "name": "research", "parent": "", "project": "", "weight": 2, "guaranteed": {"gpu": 8, "memory": "512GB"},
            "limit": {"gpu": 16}, "max_running": 0, "max_queued": 0,
        }  # fmt: skip
        share = {
            "name": "research", "weight": 2, "guaranteed": {"gpu": 8000}, "held": {"gpu": 9000, "cpu": 0, "memory": 2**39},
            "borrowed": {"gpu": 1000}, "entitled": {"gpu": 12000}, "share": 0.25, "running": 3, "queued": 1,
        }  # fmt: skip
        queued = {
            "position": 1, "job": "job_06abd-0", "name": "wait", "project": "default", "user": "ada", "nodes": 8, "nodes_min": 2,
            "resources": {"gpus": "H100:8", "cpus": 8}, "capacity": "spot", "waited_ns": 5 * 10**9, "reason": reason,
        }  # fmt: skip
        reservation = {
            "id": "rsv_1", "name": "night", "project": "default", "nodes": ["box"], "state": "planned",
            "window": {"from_ns": 2 * 10**18, "to_ns": 2 * 10**18 + 14_400 * 10**9}, "every_ns": 86_400 * 10**9,
        }  # fmt: skip
        status = {
            "version": "0.1.0", "state": "ready", "cpu_milli": 8000, "free_cpu_milli": 6000,
            "jobs": {"running": 1}, "gateway_url": self.url, "energy": "estimated",
        }  # fmt: skip
        receipt = {
            "job": JOB_ID, "name": "hello", "state": "succeeded", "queue_wait_ns": 5_000_000, "run_ns": 10**9,
            "held_ns": 10**9, "device_seconds": {"cpu": 1.0}, "amount_micro": 1234, "energy_mj": 3_600_000,
            "energy_evidence": "estimated", "carbon_mg": 400, "rate_card": "rc_1", "lines": 2,
        }  # fmt: skip
        quote = {
            "feasible": True, "starts_now": True, "duration_ns": 3600 * 10**9, "duration_known": False,
            "amount_micro": 50_000, "energy_mj": 36_000_000, "carbon_mg": 4000, "placement": [["box", "1 CPU"]],
            "reasons": [], "suggestions": [],
        }  # fmt: skip
        far = 2 * 10**18
        forecast = {"earliest_at_ns": far, "likely_at_ns": far, "latest_at_ns": 0, "basis": "two jobs end by then"}
        holding = {"job": JOB_ID, "name": "hello", "project": "default", "amount": "8 H100", "ends_at_ns": far}
        why = {
            "job": JOB_ID, "state": "queued", "position": 2, "ahead": 1, "reasons": [reason],
            "holdings": [holding, {"amount": "1 H100"}], "forecast": forecast,
        }  # fmt: skip
        workload = {"id": "wl_06abc", "name": "hello", "kind": "task", "jobs": [self.job], "state": "running"}
        return {
            ("GET", "/v1/healthz"): says({"status": "ok", "version": "0.1.0"}),
            ("GET", "/v1/status"): says(status),
            ("GET", "/v1/nodes"): listed(node),
            ("POST", "/v1/workloads"): self._submit,
            ("POST", "/v1/workloads:batch"): says({"items": [workload]}, 201),
            ("GET", "/v1/workloads/([^/]+)"): says(workload),
            ("POST", "/v1/workloads/([^/]+)/stop"): says(workload, 202),
            ("POST", "/v1/quotes"): says(quote),
            ("GET", "/v1/jobs"): listed(
                self.job, job_json(id="job_06abd-0", name="wait", state="queued", reason=reason)
            ),
            ("GET", "/v1/jobs/([^/]+)/why"): says(why),
            ("GET", "/v1/jobs/([^/]+)/models"): says({"items": [], "next_cursor": ""}),
            ("GET", "/v1/jobs/([^/]+)/receipt"): says(receipt),
            ("GET", "/v1/jobs/([^/]+)/logs"): self._logs,
            ("GET", "/v1/jobs/([^/]+)/outputs"): self._job_outputs,
            ("POST", "/v1/jobs/([^/]+)/exec"): says({"exec_id": "ex_1"}, 201),
            ("GET", "/v1/execs/([^/]+)/output"): self._exec_output,
            ("POST", "/v1/execs/([^/]+)/input"): self._exec_input,
            ("POST", "/v1/jobs/([^/]+)/stop"): self._stop,
            ("GET", "/v1/jobs/(hello|job_06abc-0|job_06)"): lambda *_, **__: (200, self.job),
            ("HEAD", "/v1/blobs/([0-9a-f]+)"): lambda _, digest, **__: (200 if digest in self.blobs else 404, None),
            ("PUT", "/v1/blobs/([0-9a-f]+)"): self._put_blob,
            ("GET", "/v1/artifacts"): listed(artifact),
            ("POST", "/v1/artifacts"): says(artifact, 201),
            ("GET", "/v1/artifacts/([^/]+)/content"): self._outputs,
            ("GET", "/v1/artifacts/([^/]+)"): says(artifact),
            ("GET", "/v1/queue"): listed(queued),
            ("GET", "/v1/share"): listed(share, share | {"name": "vision", "depth": 1, "parent": "research"}),
            ("GET", "/v1/queues"): listed(place),
            ("PUT", "/v1/queues"): self._set_tree,
            ("PUT", "/v1/queues/([^/]+)"): says(place),
            ("GET", "/v1/reservations"): listed(reservation, reservation | {"name": "fix", "project": ""}),
            ("POST", "/v1/reservations"): says(reservation, 201),
            ("DELETE", "/v1/reservations/([^/]+)"): says(reservation | {"state": "over", "window": None}),
            ("POST", "/v1/nodes/([^/]+)/mark"): says(node | {"state": "draining", "marking": "drain"}),
            ("POST", "/v1/jobs/([^/]+)/checkpoint"): says(self.job, 202),
            ("GET", "/v1/secrets"): listed({"name": "HF_TOKEN"}),
            ("PUT", "/v1/secrets/([^/]+)"): says({}),
            ("DELETE", "/v1/secrets/([^/]+)"): says(None, 204),
            ("GET", "/v1/tokens"): listed(token),
            ("POST", "/v1/tokens"): says(token | {"token": "tm_user_shown_once"}, 201),
            ("DELETE", "/v1/tokens/([^/]+)"): says(None, 204),
            ("PUT", "/v1/tokens/([^/]+)"): says(token),
            ("GET", "/v1/projects"): listed(project),
            ("POST", "/v1/completions"): self._complete,
            ("POST", "/v1/projects"): says(project, 201),
        }

    def _submit(self, _request: Any, *, body: bytes, **_: Any) -> tuple[int, Any]:
        spec = json.loads(body)["spec"]
        kind = spec.get("kind", "task")
        self.submitted.append(spec)
        self.job = job_json(
            name=spec.get("name", "hello"),
            kind=kind,
            nodes=spec.get("nodes", 1),
            endpoint="127.0.0.1:9" if kind == "service" else "",
        )
        return 201, {"id": "wl_06abc", "name": self.job["name"], "kind": spec.get("kind", "task"), "jobs": [self.job]}

    def _set_tree(self, *_: Any, body: bytes, **__: Any) -> tuple[int, Any]:
        queues = json.loads(body)["queues"]
        for queue in queues:
            if queue.get("weight") == 0:
                field = f"queues.{queue['name']}.weight"
                mistake = {
                    "field": field,
                    "value": 0,
                    "detail": "0 is not a weight.",
                    "mend": "Write a number above zero.",
                }
                return 422, {"code": "invalid_request", "kind": "invalid", **mistake}
        return 200, {"items": queues, "next_cursor": ""}

    def _stop(self, *_: Any, **__: Any) -> tuple[int, Any]:
        self.job = self.job | {"state": "cancelled"}
        return 202, self.job

    def _logs(self, request: BaseHTTPRequestHandler, _ref: str, **_: Any) -> tuple[int, Any]:
        octets = self.log.octets(request.headers.get("Last-Event-ID", ""))
        cut = self.log.cuts[self.log.answers] if self.log.answers < len(self.log.cuts) else len(octets)
        self.log.answers += 1
        if cut >= len(octets):
            self.job = self.job | self.log.end_state
        _stream(request, octets[:cut], is_whole=cut >= len(octets), kind="text/event-stream")
        return 0, None

    def _job_outputs(
        self, request: BaseHTTPRequestHandler, ref: str, *, query: dict[str, str], **_: Any
    ) -> tuple[int, Any]:
        if query.get("path") not in self.there:
            return 404, {"code": "not_found", "kind": "not_found", "detail": "The output folder has nothing there."}
        return self._outputs(request, ref)

    def _outputs(self, request: BaseHTTPRequestHandler, _ref: str, **_: Any) -> tuple[int, Any]:
        _stream(request, self.outputs, is_whole=True, kind="application/x-tar")
        return 0, None

    def _exec_output(self, request: BaseHTTPRequestHandler, _ref: str, **_: Any) -> tuple[int, Any]:
        octets = b"".join(kind + len(payload).to_bytes(4, "big") + payload for kind, payload in self.exec_output)
        _stream(request, octets, is_whole=True, kind="application/octet-stream")
        return 0, None

    def _exec_input(self, *_: Any, body: bytes, **__: Any) -> tuple[int, Any]:
        self.exec_input += body
        return 200, {}

    def _complete(self, request: BaseHTTPRequestHandler, **_: Any) -> tuple[int, Any]:
        words = [
            {"id": "c", "object": "text_completion", "choices": [{"index": 0, "text": text}]} for text in ("n", "):")
        ]
        octets = b"".join(b"data: " + json.dumps(word).encode() + b"\n\n" for word in words) + b"data: [DONE]\n\n"
        _stream(request, octets, is_whole=True, kind="text/event-stream")
        return 0, None

    def _put_blob(self, _request: Any, digest: str, *, body: bytes, **_: Any) -> tuple[int, Any]:
        self.blobs[digest] = body
        return 201, {}


def _tar(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return target.getvalue()


def _body(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding") == "chunked":
        parts = []
        while size := int(request.rfile.readline() or b"0", 16):
            parts.append(request.rfile.read(size))
            request.rfile.readline()
        request.rfile.readline()
        return b"".join(parts)
    return request.rfile.read(int(request.headers.get("Content-Length") or 0))


def _reply(request: BaseHTTPRequestHandler, status: int, value: Any) -> None:
    content = b"" if value is None else json.dumps(value).encode()
    request.send_response(status)
    request.send_header("Content-Type", "application/problem+json" if status >= 400 else "application/json")
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)


def _stream(request: BaseHTTPRequestHandler, octets: bytes, *, is_whole: bool, kind: str) -> None:
    request.send_response(200)
    request.send_header("Content-Type", kind)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    for start in range(0, len(octets), 100):
        piece = octets[start : start + 100]
        request.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
    if is_whole:
        request.wfile.write(b"0\r\n\r\n")
    else:
        request.close_connection = True


@contextmanager
def running_peer() -> Iterator[Peer]:
    """A peer that answers while the block runs."""
    peer = Peer()
    thread = threading.Thread(target=peer.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield peer
    finally:
        peer.server.shutdown()
        peer.server.server_close()
        thread.join(5)
