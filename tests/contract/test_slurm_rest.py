"""slurmrestd itself: what it is told is what the commands tell, and what it does not answer is not taken for news."""

from __future__ import annotations

import base64
import contextlib
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cloud import free_port
from tests.contract.test_engine_slurm import Centre, own_centre
from tests.slurm import why_no_rest, why_no_tokens
from tidemill.engines.slurmcommands import SlurmCommands
from tidemill.engines.slurmport import SlurmPort, Submission, host_names
from tidemill.engines.slurmrest import SlurmRest
from tidemill.errors import EngineLost
from tidemill.model.plan import ObservedState
from tidemill.testing.engine import BEGIN, eventually, observed, state

pytestmark = pytest.mark.skipif(bool(why_no_rest()), reason=why_no_rest() or "-")


LEAST = Submission(name="tidemill-one", comment="job_1", script="#!/bin/sh\nsleep 60\n", folder="/tmp", nodes=1, cpus=1)


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    with own_centre(tmp_path_factory.mktemp("rest")) as made:
        yield made.through(made.slurm.start_rest("v0.0.37", "v0.0.38"))


@pytest.fixture(scope="module")
def old(centre: Centre) -> str:
    """The address of a slurmrestd that has v0.0.37 only."""
    return centre.slurm.start_rest("v0.0.37")


def facts(centre: Centre, port: SlurmPort, submission: Submission) -> dict[str, str]:
    """What Slurm says of such a job, but for what each job has of its own."""
    number = port.submit(submission)
    line = centre.slurm.run("scontrol", "--oneliner", "show", "job", number)
    centre.slurm.run("scancel", number)
    own = re.compile(r"JobId|.*Time|.*Eval|Priority|AllocNode:Sid|JOB_GRES|NodeList|BatchHost|Command")
    said = dict(word.split("=", 1) for word in line.split() if "=" in word)
    return {name: value for name, value in said.items() if not own.fullmatch(name)} | {"TimeLimit": said["TimeLimit"]}


@pytest.mark.parametrize(
    "asked",
    [
        LEAST,
        replace(LEAST, nodes=2, cpus=2, memory_mib=300, gpus=2, gpu_kind="h100"),
        replace(LEAST, gpus=1, minutes=7, options=(("partition", "few"), ("constraint", "fast|slow"))),
    ],
    ids=["least", "a gang", "options"],
)
def test_a_job_is_the_same_each_way(centre: Centre, old: str, asked: Submission) -> None:
    centre.slurm.run("scontrol", "update", "nodename=n1,n2,n3", "availablefeatures=fast,slow")
    expected = facts(centre, SlurmCommands(), asked)
    assert (expected["Requeue"], expected["Comment"]) == ("0", "job_1")
    for address in (centre.rest, old):
        assert facts(centre, SlurmRest(address), asked) == expected


def test_nodes_are_the_same_each_way(centre: Centre, old: str) -> None:
    centre.slurm.run("scontrol", "update", "nodename=n2", "state=drain", "reason=test")
    try:
        expected = SlurmCommands().nodes()
        assert [node.partitions for node in expected] == [("main",), ("main", "few"), ("main", "few")]
        assert [SlurmRest(address).nodes() for address in (centre.rest, old)] == [expected, expected]
    finally:
        centre.slurm.run("scontrol", "update", "nodename=n2", "state=resume")


def test_the_newest_version_that_is_there_is_used(centre: Centre, old: str) -> None:
    dialects = [SlurmRest(address).dialect for address in (centre.rest, old)]
    assert [each.version for each in dialects] == [38, 37]
    assert {(each.accounting, each.signals_batch) for each in dialects} == {(0, False)}


@pytest.mark.parametrize("nodes", ["n1", "n[1-3,7],m1", "r[08-11]x[1-2]", "a[1-2],b[3,5]", "a-1,b-[1-2]"])
def test_lists_of_nodes_are_read_as_slurm_reads_them(centre: Centre, nodes: str) -> None:
    assert host_names(nodes) == centre.slurm.run("scontrol", "show", "hostnames", nodes).split()


def test_a_lost_answer_makes_no_second_job(centre: Centre, tmp_path: Path) -> None:
    """slurmrestd submits, and its answer never comes: the job is found by its name."""
    spec = centre.bench.spec(BEGIN)
    with swallowing(tmp_path / "socket", centre.rest.removeprefix("unix:"), b"POST ") as address:
        with pytest.raises(EngineLost, match="does not answer POST"):
            centre.through(address).engine().launch(spec)
        centre.through(address).engine().launch(spec)  # is found: nothing is posted
    centre.control.wait_for_event(spec.launch_id, "exited")
    assert centre.bench.starts(spec) == 1
    names = centre.slurm.run("squeue", "-h", "-t", "all", "-o", "%j").split()
    assert names.count(f"tidemill-{spec.launch_id}") == 1


@contextlib.contextmanager
def swallowing(path: Path, behind: str, verb: bytes) -> Iterator[str]:
    """The address of one who passes requests on, and answers but for those to requests of that verb."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                pass_on(listener.accept()[0])

    def pass_on(client: socket.socket) -> None:
        with client, socket.socket(socket.AF_UNIX) as server:
            server.connect(behind)
            request = b""
            while b"\r\n\r\n" not in request:
                request += client.recv(65_536)
            length = re.search(rb"(?i)content-length: (\d+)", request)
            while length and len(request.partition(b"\r\n\r\n")[2]) < int(length[1]):
                request += client.recv(65_536)
            server.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            answer = b"".join(iter(lambda: server.recv(65_536), b""))
            if not request.startswith(verb):
                client.sendall(answer)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"unix:{path}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


@pytest.mark.skipif(bool(why_no_tokens()), reason=why_no_tokens() or "-")
def test_over_http_a_token_says_who_asks_and_a_new_one_is_read(centre: Centre, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(centre.slurm.token())
    address = centre.slurm.start_rest("v0.0.38", port=free_port())
    engine = centre.through(address).engine(rest_token=str(token))
    spec = centre.bench.spec(BEGIN)
    engine.launch(spec)
    centre.control.wait_for_event(spec.launch_id, "exited")
    eventually(lambda: state(engine, spec.launch_id) is ObservedState.EXITED, what="it is over")
    seen = observed(engine, spec.launch_id)
    token.write_text("SLURM_JWT=nonsense\n")
    with pytest.raises(EngineLost, match=r"GET /slurm/v0\.0\.38/jobs") as refused:
        engine.observe()
    assert refused.value.mend.startswith("Write a new one: scontrol token username=root ")
    over = base64.urlsafe_b64encode(b'{"exp": 1700000000}').decode()
    token.write_text(f"SLURM_JWT=x.{over}.x")
    with pytest.raises(EngineLost, match="The token for slurmrestd has expired"):
        engine.nodes()
    token.write_text(centre.slurm.token())
    assert observed(engine, spec.launch_id) == seen


LISTEN = """
import os, socket, sys, time
os.setuid(65534)
one = socket.socket(socket.AF_UNIX)
one.bind(sys.argv[1])
one.listen()
print(flush=True)
time.sleep(60)
"""


def test_a_slurmrestd_of_somebody_else_is_not_asked() -> None:
    """It would take what root asks for its own user's."""
    folder = Path(tempfile.mkdtemp())  # pytest's own are closed to other users
    folder.chmod(0o777)
    other = subprocess.Popen([sys.executable, "-c", LISTEN, str(folder / "socket")], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(EngineLost, match="it runs as user 65534, and jobs would be that one's, not of 0"):
            SlurmRest(f"unix:{folder}/socket").nodes()
    finally:
        other.kill()
        other.wait()
        shutil.rmtree(folder)
