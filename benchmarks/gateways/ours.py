"""Tidemill's gateway, of a cloud with all it does, and its services: the upstream in several sizes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil
import uvloop
from tests.cloud import Cloud, eventually
from tests.faults.serving import gateway_pid, metered, replicas

from benchmarks.clouds import PROGRAMS, kill_all_of
from benchmarks.gateways.asking import Asker, until_answers
from benchmarks.gateways.contenders import Contender

_UPSTREAM: Final = Path(__file__).resolve().with_name("upstream.py")
_STILL_S: Final = 5.0
"""Longer than a gateway takes to hand its books on, and to find those of one that was killed."""


@dataclass(frozen=True, slots=True)
class Line:
    """What the upstream's journal has of one request; instants by the monotonic clock, in ns."""

    name: str
    tokens: int
    is_whole: bool
    began_ns: int
    ended_ns: int


@dataclass(frozen=True, slots=True)
class Service:
    """A running upstream that is a service of the cloud."""

    cloud: Cloud
    name: str
    job: str

    def lines(self, *starts: str) -> list[Line]:
        """What its journal has of requests whose id begins like one of these, in order of their ends."""
        return [
            Line(row[0], int(row[1]), row[2] == "1", int(row[3]), int(row[4]))
            for row in self._rows()
            if len(row) == 5 and row[0].startswith(starts)
        ]

    def ups(self) -> list[int]:
        """When replicas of it began to listen (ns)."""
        return [int(row[1]) for row in self._rows() if row[0] == "up"]

    def contender(self) -> Contender:
        """Itself, as it is reached without anything before it."""
        process = next(each for each in psutil.process_iter() if _is_upstream(each, self.job))
        return Contender(self.name, int(process.cmdline()[process.cmdline().index("--port") + 1]), "", process.pid)

    def _rows(self) -> Iterator[list[str]]:
        for path in self.cloud.home.glob(f"local/volumes/*/{self.job}/output/journal"):
            for line in path.read_text().splitlines():
                yield line.split()


def _is_upstream(process: psutil.Process, job: str) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return _UPSTREAM.name in words and "python" in words[0] and process.environ().get("TIDEMILL_JOB_ID") == job
    return False


@dataclass(frozen=True, slots=True)
class Ours:
    """The cloud whose gateway is measured."""

    cloud: Cloud
    folder: Path

    @property
    def contender(self) -> Contender:
        """Its gateway as it is now: one that was killed has another process."""
        return Contender("tidemill", self.cloud.gateway_port, self.cloud.token, gateway_pid(self.cloud))

    @property
    def asker(self) -> Asker:
        """Asks it with the administrator's key."""
        return Asker(self.cloud.gateway_port, self.cloud.token)

    @contextlib.contextmanager
    def service(self, name: str, *, is_asleep: bool = False, **section: Any) -> Iterator[Service]:
        """The upstream as a service of that name, ready unless it is to sleep; ``section`` is of its spec."""
        spec = {
            "name": name, "kind": "service", "workdir": str(_UPSTREAM.parent), "ports": [{"name": "http"}],
            "run": f"exec python3 {_UPSTREAM.name} --port $PORT --journal $TIDEMILL_OUTPUT_DIR/journal",
            "env": {"packages": [f"uvloop=={uvloop.__version__}"]},
            "resources": {"gpus": "none", "cpus": 0.1, "memory": "1GB"}, "service": {"port": "http", **section},
        }  # fmt: skip
        file = self.folder / f"{name}.json"
        file.write_text(json.dumps(spec))
        self._tidemill("run", "-d", str(file))
        status, found = self.cloud.call("GET", "/v1/jobs?limit=1000")
        job = next(str(one["id"]) for one in found["items"] if one["name"] == name) if status == 200 else ""
        try:
            if not is_asleep:
                until_answers(self.cloud.gateway_port, self.cloud.token, f"service {name}", model=name)
            yield Service(self.cloud, name, job)
        finally:
            self._tidemill("stop", name)
            self.cloud.wait(job, within_s=30)

    def key(self, name: str, **limits: int) -> str:
        """A key for inference with those limits, known to the gateway; names with ``_per_`` for the slash."""
        given = {limit.replace("_per_", "/"): amount for limit, amount in limits.items()}
        status, body = self.cloud.call("POST", "/v1/tokens", {"name": name, "scopes": ["infer"], "limits": given})
        if status != 201:
            raise RuntimeError(f"key {name} is not made: {body}")
        key = str(body["token"])
        asker = Asker(self.cloud.gateway_port, key)

        async def status_of() -> int:
            head = f"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n\r\n"
            answer = await asker.ask(head.encode())
            asker.close()
            return answer.status

        eventually(lambda: uvloop.run(status_of()) == 200, within_s=10, what=f"the gateway knows key {name}")
        return key

    def replicas(self, model: str) -> int:
        """Replicas that the gateway sends requests to."""
        return replicas(self.cloud, model)

    def usage(self, model: str) -> dict[str, int]:
        """What ``tidemill usage`` says of a model: requests, prompt_tokens, completion_tokens, estimated."""
        told = json.loads(self._tidemill("usage", "--json"))["tokens"]
        names = ("requests", "prompt_tokens", "completion_tokens", "estimated")
        found = next((one for one in told if one["model"] == model), {})
        return {name: int(found.get(name, 0)) for name in names}

    def usages(self, model: str, *starts: str) -> list[dict[str, Any]]:
        """What the ledger has under labels that begin like these, once it gets no more of that model."""
        seen = -1
        while (now := self.usage(model)["requests"]) != seen:
            seen = now
            time.sleep(_STILL_S)
        return [one for one in metered(self.cloud, model) if one["label"].startswith(starts)]

    def _tidemill(self, *words: str) -> str:
        own = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMILL_")}
        environment = {**own, "PATH": f"{PROGRAMS}:{own.get('PATH', '')}", "TIDEMILL_HOME": str(self.cloud.home)}
        done = subprocess.run(
            [str(PROGRAMS / "tidemill"), *words], env=environment, check=False, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"tidemill {' '.join(words)}: {done.stderr}")
        return done.stdout


@contextlib.contextmanager
def ours() -> Iterator[Ours]:
    """A cloud whose gateway is one process. Afterwards it is killed with all that it started."""
    with tempfile.TemporaryDirectory(prefix="tidemill-bench-", ignore_cleanup_errors=True) as name:
        made = Cloud(Path(name) / "home")
        try:
            made.up()
            yield Ours(made, Path(name))
        except Exception:
            with contextlib.suppress(OSError):
                print("\n".join((made.home / "control.log").read_text().splitlines()[-40:]))
            raise
        finally:
            kill_all_of(Path(name))
            if made.process is not None:
                made.process.wait()
