"""A service for fault cases: an engine that streams slowly and keeps a journal, and a client that times all it sees."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cloud import Cloud, eventually
from tests.faults.suite.journal import witness

ENGINE = r"""
import json, os, socketserver, sys, threading, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

folder = os.environ["TIDEMILL_OUTPUT_DIR"]
journal = os.open(os.path.join(folder, "journal"), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

def note(what, **more):
    line = {"what": what, "at": time.monotonic(), "pid": os.getpid(), **more}
    os.write(journal, (json.dumps(line) + "\n").encode())
    os.fsync(journal)

counting = threading.Lock()

class Handler(BaseHTTPRequestHandler):
    under_way = 0
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def do_GET(self):
        try:
            with open(os.path.join(folder, "metrics"), "rb") as file:
                told = file.read() if self.path == "/metrics" else None
        except OSError:
            told = None
        if told is None:
            self.reply(200, {"status": "ok"})
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(told)))
        self.end_headers()
        self.wfile.write(told)

    def reply(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def piece(self, data):
        self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data))

    def event(self, content):
        self.piece(b"data: " + json.dumps(content).encode() + b"\n\n")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        tag, tokens, pause = asked.get("tag", ""), asked.get("max_tokens", 5), asked.get("pause", 0.02)
        note("call", tag=tag)
        sent = 0
        with counting:
            Handler.under_way += 1
        usage = lambda: {"prompt_tokens": 7, "completion_tokens": sent, "total_tokens": 7 + sent}
        try:
            time.sleep(asked.get("think", 0) + asked.get("think_each", 0) * Handler.under_way)
            if os.environ.get("ENGINE_FAILS"):
                self.reply(500, {"error": {"code": "broken", "message": "it is broken"}})
                return
            if not asked.get("stream"):
                time.sleep(pause * tokens)
                sent = tokens
                self.reply(200, {"object": "text_completion", "choices": [{"index": 0, "text": "x " * tokens}], "usage": usage()})
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(tokens):
                self.event({"choices": [{"index": 0, "text": f"t{number} "}]})
                sent += 1
                time.sleep(pause)
            if (asked.get("stream_options") or {}).get("include_usage"):
                self.event({"choices": [], "usage": usage()})
            self.piece(b"data: [DONE]\n\n")
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True
        finally:
            with counting:
                Handler.under_way -= 1
            note("end", tag=tag, tokens=sent)

class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 512

start = float(os.environ.get("ENGINE_START_S", "0"))
fails = os.path.join(folder, "fail-once")
if os.environ.get("ENGINE_FAILS_FIRST") and not os.path.exists(fails):
    open(fails, "w").close()
    note("fail")
    sys.exit(3)
time.sleep(start)
note("start")
Server(("", int(os.environ["PORT"])), Handler).serve_forever()
"""


def service(model: str, **more: Any) -> dict[str, Any]:
    """The spec of a service of that name: ``more`` is of its section; ``envs`` are the engine's own settings."""
    envs = more.pop("envs", {})
    return {
        "kind": "service",
        "name": model,
        "run": f"exec python3 -u - <<'END'\n{witness(ENGINE, cpus=0.1, gpus=0.1)}\nEND",
        "resources": {"cpus": 0.1},
        "envs": envs,
        "checkpoint": {"grace": "1s"},
        "service": {"readiness": {"path": "/health", "timeout": "30s"}, **more},
    }


@dataclass(slots=True)
class Seen:
    """What a client saw of one request; instants by the monotonic clock."""

    tag: str
    began: float
    status: int = 0
    first_at: float = 0.0
    ended: float = 0.0
    tokens: int = 0
    usage_events: int = 0
    is_whole: bool = False
    error: str = ""
    retry_after: str = ""

    @property
    def took_s(self) -> float:
        """From the request to the end of its answer."""
        return self.ended - self.began


@dataclass(slots=True)
class Crowd:
    """Requests under way in threads of their own."""

    cloud: Cloud
    model: str
    seen: list[Seen] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)

    def ask(self, tag: str, **body: Any) -> Seen:
        """Send a request in a thread of its own."""
        seen = Seen(tag=tag, began=time.monotonic())
        self.seen.append(seen)
        thread = threading.Thread(target=ask, args=(self.cloud, self.model, seen), kwargs=body, daemon=True)
        self._threads.append(thread)
        thread.start()
        return seen

    def wait(self, *, within_s: float) -> None:
        """Until every answer has ended. Raises: AssertionError that names those that have not."""
        until = time.monotonic() + within_s
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        hanging = [one.tag for one, thread in zip(self.seen, self._threads, strict=True) if thread.is_alive()]
        assert not hanging, f"not answered within {within_s} s: {hanging[:5]} and so on, {len(hanging)} in all"


def ask(cloud: Cloud, model: str, seen: Seen, *, wait_s: float | None = None, token: str = "", **body: Any) -> None:
    """Note in ``seen`` what comes back for one completion."""
    headers = {"Authorization": f"Bearer {token or cloud.token}", "Content-Type": "application/json"}
    if wait_s is not None:
        headers["X-Tidemill-Wait"] = str(wait_s)
    connection = http.client.HTTPConnection("127.0.0.1", cloud.gateway_port, timeout=60)
    try:
        connection.request("POST", "/v1/completions", json.dumps({"model": model, "tag": seen.tag, **body}), headers)
        answer = connection.getresponse()
        seen.status, seen.retry_after = answer.status, answer.headers.get("Retry-After", "")
        if body.get("stream") and answer.status == 200:
            _read_stream(answer, seen)
        else:
            content = json.loads(answer.read())
            seen.first_at = time.monotonic()
            seen.is_whole = answer.status == 200
            seen.tokens = content.get("usage", {}).get("completion_tokens", 0)
            seen.error = content.get("error", {}).get("code", "")
    except (OSError, http.client.HTTPException, ValueError) as error:
        seen.error = seen.error or f"{type(error).__name__}: {error}"
    finally:
        seen.ended = time.monotonic()
        connection.close()


def _read_stream(answer: http.client.HTTPResponse, seen: Seen) -> None:
    for line in answer:
        if not line.startswith(b"data: "):
            continue
        seen.first_at = seen.first_at or time.monotonic()
        if line.startswith(b"data: [DONE]"):
            seen.is_whole = True
            continue
        content = json.loads(line[6:])
        if "error" in content:
            seen.error = content["error"]["code"]
        elif content.get("usage"):
            seen.usage_events += 1
        elif content["choices"][0].get("text"):
            seen.tokens += 1


@dataclass(frozen=True, slots=True)
class Journals:
    """What the replicas of a service wrote down themselves, wherever they ran in that home."""

    home: Path

    def lines(self) -> list[dict[str, Any]]:
        """All lines, by time; each with the ``job`` that wrote it. A last line without its end is left out."""
        found = []
        for path in (self.home / "local" / "volumes").glob("*/*/output/journal"):
            for line in path.read_text().splitlines():
                with contextlib.suppress(ValueError):
                    found.append(json.loads(line) | {"job": path.parts[-3]})
        return sorted(found, key=lambda line: float(line["at"]))

    def of(self, what: str) -> list[dict[str, Any]]:
        """The lines of one sort."""
        return [line for line in self.lines() if line["what"] == what]

    def calls(self, tag: str) -> list[dict[str, Any]]:
        """Which replicas were called with a request."""
        return [line for line in self.of("call") if line["tag"] == tag]


def pid_of(job: str) -> int:
    """The process id, here and not in its sandbox, of a replica's engine; 0 while there is none."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().split(b"\0")
                if command[1:3] == [b"-u", b"-"] and f"TIDEMILL_JOB_ID={job}\0".encode() in (
                    (entry / "environ").read_bytes() + b"\0"
                ):
                    return int(entry.name)
    return 0


@contextlib.contextmanager
def serving(cloud: Cloud, spec: dict[str, Any], *, within_s: float = 60.0) -> Iterator[list[str]]:
    """The job ids of a service of which all replicas are ready for the gateway; it is stopped afterwards."""
    status, body = cloud.call("POST", "/v1/workloads", {"spec": on_gpus(cloud, spec)})
    assert status == 201, body
    jobs = [str(job["id"]) for job in body["jobs"]]
    try:
        eventually(
            lambda: replicas(cloud, spec["name"]) >= _fewest(spec, len(jobs)),
            within_s=within_s,
            what=f"all replicas of {spec['name']} are routed to",
        )
        yield jobs
    finally:
        for job in jobs:
            cloud.call("POST", f"/v1/jobs/{job}/stop")
        for job in jobs:
            cloud.wait(job, within_s=30)


def on_gpus(cloud: Cloud, spec: dict[str, Any]) -> dict[str, Any]:
    """The spec with a share of a GPU for each replica, where that cloud has some."""
    return spec | {"resources": spec["resources"] | ({"gpus": cloud.gpus} if cloud.gpus else {})}


def _fewest(spec: dict[str, Any], all_of_them: int) -> int:
    written = str(spec["service"].get("replicas", all_of_them))
    return int(written.split("..")[0])


def replicas(cloud: Cloud, model: str) -> int:
    """How many replicas of a model the gateway knows and sends requests to; -1 while it does not answer."""
    return int(metric(cloud, "replicas", model=model, state="closed"))


def metric(cloud: Cloud, name: str, **labels: str) -> float:
    """A figure of the gateway's own; -1 when there is none, or no answer."""
    with contextlib.suppress(OSError, http.client.HTTPException):
        connection = http.client.HTTPConnection("127.0.0.1", cloud.gateway_port, timeout=5)
        connection.request("GET", "/metrics", headers={"Authorization": f"Bearer {cloud.token}"})
        text = connection.getresponse().read().decode()
        connection.close()
        wanted = ",".join(f'{key}="{value}"' for key, value in labels.items())
        for line in text.splitlines():
            if line.startswith(f"tidemill_gateway_{name}{{{wanted}}} "):
                return float(line.rpartition(" ")[2])
    return -1.0


def percentile(values: list[float], share: float) -> float:
    """The value that the given share of all is not above."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def watch(look: Callable[[], bool], *, within_s: float, what: str) -> float:
    """How long it took until ``look`` came to hold, in seconds."""
    began = time.monotonic()
    eventually(look, within_s=within_s, what=what)
    return time.monotonic() - began


def half_read(cloud: Cloud, model: str, **body: Any) -> socket.socket:
    """A connection on which a request was sent and of whose answer nothing was read."""
    content = json.dumps({"model": model, **body}).encode()
    client = socket.create_connection(("127.0.0.1", cloud.gateway_port), timeout=10)
    client.sendall(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %b\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (cloud.token.encode(), len(content)) + content
    )
    return client


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request of a flood."""

    status: int
    took_s: float
    retry_after: str = ""
    tokens: int = 0


def flood(
    cloud: Cloud, model: str, *, seconds: float, rate: float = 0.0, at_once: int = 0, **body: Any
) -> tuple[list[Outcome], float]:
    """What became of requests sent at that rate, whatever comes back, or ``at_once`` at a time; and how long it took."""
    return asyncio.run(_flood(cloud, model, seconds=seconds, rate=rate, at_once=at_once, body=body))


async def _flood(
    cloud: Cloud, model: str, *, seconds: float, rate: float, at_once: int, body: dict[str, Any]
) -> tuple[list[Outcome], float]:
    content = json.dumps({"model": model, **body}).encode()
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {cloud.token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    ).encode() + content
    idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    outcomes: list[Outcome] = []

    async def one() -> None:
        began = time.monotonic()
        try:
            reader, writer = idle.pop() if idle else await asyncio.open_connection("127.0.0.1", cloud.gateway_port)
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            fields = {k.lower(): v for k, _, v in (line.partition(": ") for line in head.split("\r\n")[1:])}
            answer = json.loads(await reader.readexactly(int(fields["content-length"])))
            idle.append((reader, writer))
            status, after = int(head.split()[1]), fields.get("retry-after", "")
            tokens = answer.get("usage", {}).get("completion_tokens", 0)
        except (OSError, asyncio.IncompleteReadError):
            status, after, tokens = 0, "", 0
        outcomes.append(Outcome(status, time.monotonic() - began, after, tokens))

    async def again_and_again(until: float) -> None:
        while time.monotonic() < until:
            await one()

    began = time.monotonic()
    until = began + seconds
    if at_once:
        await asyncio.gather(*(again_and_again(until) for _ in range(at_once)))
    else:
        tasks = []
        for number in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
            tasks.append(asyncio.create_task(one()))
        await asyncio.gather(*tasks)
    took_s = time.monotonic() - began
    for _, writer in idle:
        writer.close()
    return outcomes, took_s


def gateway_pid(cloud: Cloud) -> int:
    """The process id of the gateway of that cloud; 0 while there is none."""
    return next(iter(gateway_pids(cloud)), 0)


def gateway_pids(cloud: Cloud) -> list[int]:
    """The process ids of all of it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().split(b"\0")
                if command[1:3] == [b"-m", b"tidemill.gateway"] and str(cloud.home).encode() in command:
                    found.append(int(entry.name))
    return found


def rss_of(pid: int) -> int:
    """Bytes of memory that a process has resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def metered(cloud: Cloud, model: str) -> list[dict[str, Any]]:
    """What the ledger has of requests to a model."""
    items: list[dict[str, Any]] = []
    cursor = ""
    while True:
        status, body = cloud.call("GET", f"/v1/ledger/tokens?limit=1000&cursor={cursor}")
        assert status == 200, body
        items += [item for item in body["items"] if item["model"] == model]
        if not (cursor := body["next_cursor"]):
            return items
