"""A Slurm cluster for measuring, and a cloud to which it is a site."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.slurm import NODES, Slurm, slurm_cluster
from tests.slurm import why_not as why_not

from benchmarks.clouds import PROGRAMS, Home, cloud, kill_all_of

_PATIENCE_S = 60.0


@contextlib.contextmanager
def cluster(**shape: Any) -> Iterator[Slurm]:
    """A cluster of its own, to which this process and those that it starts submit; see ``slurm_cluster``."""
    folder = Path(tempfile.mkdtemp(prefix="slurm-bench-"))
    before = os.environ.get("SLURM_CONF")
    try:
        with slurm_cluster(folder, **shape) as slurm:
            os.environ.update(slurm.environment)
            yield slurm
    finally:
        os.environ.pop("SLURM_CONF", None)
        if before is not None:
            os.environ["SLURM_CONF"] = before
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cloud_on_slurm(slurm: Slurm, **settings: Any) -> Iterator[Home]:
    """A cloud whose only machines are the cluster's nodes: an outpost has joined, its own machine is cordoned."""
    with cloud(**settings) as home:

        def tidemill(*words: str) -> str:
            command = [str(PROGRAMS / "tidemill"), *words]
            environment = {**home.environment, **slurm.environment}
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            return done.stdout

        def states() -> dict[str, str]:
            return {node["name"]: node["state"] for node in json.loads(tidemill("nodes", "--json"))}

        for name in states():
            tidemill("cordon", name)
        tidemill("site", "set", "centre", "--engine", "slurm")
        token = json.loads(tidemill("site", "token", "centre", "--json"))["token"]
        outpost = home.folder / "outpost"
        tidemill("join", home.url, "--token", token, "--home", str(outpost), "--address", "127.0.0.1")
        try:
            until_s = time.monotonic() + _PATIENCE_S
            while any(states().get(name) != "ready" for name in NODES):
                if time.monotonic() > until_s:
                    raise RuntimeError("the nodes of the Slurm cluster do not join")
                time.sleep(0.2)
            yield home
        finally:
            kill_all_of(outpost)
