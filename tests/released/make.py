"""Writes ``<revision>.sql`` and ``<revision>.json``: a small database of a released version, made by that version itself.

Run it with that version's own code and tests before this folder on the path; see README.md. Its cloud runs jobs of all
kinds and ends, then is killed with some still running, waiting and backing off. What it answered itself is kept beside.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.cloud import Cloud

LITTLE = {"cpus": 0.05}
ANSWERS = ("/v1/jobs?limit=1000", "/v1/usage", "/v1/projects", "/v1/artifacts", "/v1/secrets", "/v1/tokens")


def main(revision: str, folder: Path) -> None:
    """Write both files into ``folder``."""
    with tempfile.TemporaryDirectory() as temporary:
        cloud = Cloud(Path(temporary) / "home", rates={"cpu": 0.03}, country="DEU")
        cloud.up()
        try:
            live = live_it(cloud)
            answers = {path: cloud.call("GET", path)[1] for path in ANSWERS}
            answers |= {
                f"/v1/jobs/{job}/receipt": cloud.call("GET", f"/v1/jobs/{job}/receipt")[1] for job in live["over"]
            }
            cloud.kill()
            with contextlib.closing(sqlite3.connect(cloud.home / "control.db")) as database:
                dump = "\n".join(database.iterdump()) + "\n"
            key = (cloud.home / "secret.key").read_text().strip()
        finally:
            cloud.down()
    found = {"revision": revision, "secret.key": key, **live, "answers": answers}
    (folder / f"{revision}.sql").write_text(dump, encoding="utf-8")
    (folder / f"{revision}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def live_it(cloud: Cloud) -> dict[str, Any]:
    """Something of everything: by what became of it, the ids of jobs."""
    call = cloud.call
    assert call("POST", "/v1/projects", {"name": "vision", "limit_cpu_milli": 2_000})[0] == 201
    assert call("PUT", "/v1/secrets/HF_TOKEN", {"value": "öffentlich nicht"})[0] == 200
    assert call("POST", "/v1/tokens", {"name": "ci", "scopes": ["submit", "read"]})[0] == 201
    over = [
        cloud.submit(
            {"kind": "task", "name": "fine", "run": "echo hi > $TIDEMILL_OUTPUT_DIR/model", "resources": LITTLE},
            key="once",
        ),
        cloud.submit({"kind": "task", "name": "broken", "run": "exit 3", "resources": LITTLE}),
        cloud.submit(
            {
                "kind": "task",
                "name": "tried",
                "run": "exit 4",
                "resources": LITTLE,
                "retry": {"max": 1, "on": ["error"]},
            }
        ),
        cloud.submit({"kind": "task", "name": "gang", "run": "true", "nodes": 2, "resources": LITTLE}),
        cloud.submit({"kind": "array", "name": "many", "run": "true", "array": {"size": 3}, "resources": LITTLE}),
        cloud.submit(
            {
                "kind": "task",
                "name": "unsaid",
                "run": "true",
                "resources": LITTLE,
                "secrets": ["HF_TOKEN"],
                "labels": {"team": "größe"},
            }
        ),
    ]
    for job in over:
        cloud.wait(job)
    made = call("POST", "/v1/artifacts", {"name": "model", "job": over[0], "path": "model"})
    assert made[0] == 201, made
    stopped = cloud.submit({"kind": "task", "name": "stopped", "run": "sleep 600", "resources": LITTLE})
    cloud.wait(stopped, "running")
    assert call("POST", f"/v1/jobs/{stopped}/stop")[0] == 202
    cloud.wait(stopped)
    runs = cloud.submit({"kind": "task", "name": "runs", "run": "sleep 600", "resources": LITTLE, "max_duration": "2h"})
    serves = cloud.submit(
        {
            "kind": "service",
            "name": "chat",
            "run": "sleep 600",
            "resources": LITTLE,
            "ports": ["http"],
            "service": {"model": "m", "port": "http"},
        }
    )
    cloud.wait(runs, "running")
    every = call("GET", "/v1/status")[1]["cpu_milli"] / 1000
    waits = cloud.submit({"kind": "task", "name": "waits", "run": "true", "resources": {"cpus": every}})
    backs_off = cloud.submit(
        {"kind": "task", "name": "again", "run": "exit 5", "resources": LITTLE, "retry": {"max": 50, "on": ["error"]}}
    )
    cloud.wait(backs_off, "queued")
    return {"over": [*over, stopped], "live": [runs, serves, waits, backs_off], "workers": [runs]}


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
