"""The truth, written down by the workers themselves and synced to disk, outside of whatever Tidemill believes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

WITNESS: Final = """
import json, os, socket, threading, time
_signs = os.open(os.environ["TIDEMILL_OUTPUT_DIR"] + "/journal-" + os.environ.get("RANK", "0"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
who = dict(launch=os.environ["TIDEMILL_LAUNCH_ID"], job=os.environ["TIDEMILL_JOB_ID"], fence=int(os.environ["TIDEMILL_ATTEMPT"]),
           rank=int(os.environ.get("RANK", "0")), milli={milli}, gpu_milli={gpu_milli},
           devices=[device for device in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if device])
def _sign(what, sync=True):
    os.write(_signs, (json.dumps(dict(who, what=what, at_ns=time.monotonic_ns())) + "\\n").encode())
    if sync:
        os.fsync(_signs)
def _live():
    while True:
        try:
            _sign("alive", sync=False)
        except OSError:
            pass  # a full disk does not end it
        time.sleep(0.05)
_sign("start")
threading.Thread(target=_live, daemon=True).start()
{body}
_sign("end")
"""
"""What writes down the launch, its fencing token, which is the number of the attempt, and the devices that were given."""
LINES: Final = """
for number in range({lines}):
    print(f"line {{number}} of rank {{who['rank']}}", flush=True)
    time.sleep({pause})
"""
SERVE: Final = """
import http.server
class Streams(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "2"); self.end_headers(); self.wfile.write(b"ok")
    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.send_response(200); self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked"); self.end_headers()
        for number in list(range({chunks})) + ["[DONE]"]:
            data = f"data: {{json.dumps(dict(number=number)) if number != '[DONE]' else number}}\\n\\n".encode()
            self.wfile.write(b"%x\\r\\n%s\\r\\n" % (len(data), data)); self.wfile.flush()
            time.sleep({pause})
        self.wfile.write(b"0\\r\\n\\r\\n")
server = http.server.ThreadingHTTPServer(("", int(os.environ["PORT"])), Streams)
server.daemon_threads = True
server.serve_forever()
"""


def witness(body: str, *, cpus: float, gpus: float) -> str:
    """A program that keeps the journal while it does ``body``. A share of a GPU is one below 1."""
    return WITNESS.format(milli=round(cpus * 1000), gpu_milli=round(min(gpus, 1.0) * 1000), body=body)


@dataclass(frozen=True, slots=True, kw_only=True)
class Life:
    """One start of one worker: when it began, the last sign of it, and whether it came to its own end. Times in ns.

    ``fence`` is its fencing token, ``milli`` the CPU it was promised, ``gpu_milli`` its share of each of ``devices``.
    """

    launch: str
    job: str
    fence: int
    rank: int
    milli: int
    gpu_milli: int
    devices: tuple[str, ...]
    home: Path
    began_ns: int
    last_ns: int
    ended: bool


def lives(homes: Iterable[Path]) -> list[Life]:
    """Every start that workers of those homes wrote down, in order of time. A start without an id is a bug of ours."""
    found: list[Life] = []
    for home in homes:
        for path in sorted((home / "local" / "volumes").glob("*/*/output/journal-*")):
            found += _lives(home, path.read_text().splitlines())
    return sorted(found, key=lambda life: life.began_ns)


def _lives(home: Path, lines: Iterable[str]) -> list[Life]:
    found: list[dict[str, Any]] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the last line of one that was killed while it wrote
        if entry["what"] == "start":
            found.append({**entry, "began_ns": entry["at_ns"], "last_ns": entry["at_ns"], "ended": False})
            continue
        for one in found:
            if one["launch"] == entry["launch"]:
                one["last_ns"] = max(one["last_ns"], entry["at_ns"])
                one["ended"] |= entry["what"] == "end"
    return [
        Life(
            launch=one["launch"], job=one["job"], fence=one["fence"], rank=one["rank"], milli=one["milli"],
            gpu_milli=one["gpu_milli"], devices=tuple(one["devices"]), home=home, began_ns=one["began_ns"],
            last_ns=one["last_ns"], ended=one["ended"],
        )
        for one in found
    ]  # fmt: skip
