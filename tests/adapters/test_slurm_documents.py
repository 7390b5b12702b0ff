"""slurmrestd's documents in the shapes of all its versions: read the same, written as each wants, and named when wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tidemill.cli import main
from tidemill.engines import slurmdocuments
from tidemill.engines.slurm import SlurmSettings
from tidemill.engines.slurmending import Ending
from tidemill.engines.slurmport import Held, SlurmJob, SlurmNode, Submission
from tidemill.engines.slurmrest import SlurmRest, checked_address, dialect_of
from tidemill.errors import EngineLost, EngineRefused, InvalidSetting

NOT_SET = {"set": False, "infinite": False, "number": 0}
REST = ("jobs", "job/submit", "job/{job_id}", "nodes", "partitions")


def number(value: int) -> dict[str, Any]:
    return {"set": True, "infinite": False, "number": value}


JOB_38 = {
    "job_id": 7, "name": "tidemill-a", "job_state": "FAILED", "state_reason": "NonZeroExitCode", "nodes": "n[1-2]",
    "node_count": 2, "cpus": 4, "memory_per_node": 300, "memory_per_cpu": None, "tres_per_node": "gres:gpu:h100:1",
    "exit_code": 9, "start_time": 100, "end_time": 161, "user_id": 0, "user_name": "root",
}  # fmt: skip
JOB_39 = {
    **JOB_38, "node_count": number(2), "cpus": number(4), "memory_per_node": number(300), "memory_per_cpu": NOT_SET,
    "exit_code": number(9),
}  # fmt: skip
JOB_42 = {
    **JOB_39, "job_state": ["FAILED"], "tres_per_node": "gres/gpu:h100:1", "start_time": number(100),
    "end_time": number(161),
    "exit_code": {
        "status": ["SIGNALED"], "return_code": NOT_SET, "signal": {"id": number(9), "name": "KILL"}
    },
}  # fmt: skip
JOBS = [pytest.param(JOB_38, id="v38"), pytest.param(JOB_39, id="v39"), pytest.param(JOB_42, id="v42")]


@pytest.mark.parametrize("document", JOBS)
def test_a_job_is_read_the_same_in_all_versions(document: dict[str, Any]) -> None:
    assert slurmdocuments.job(document, "jobs[0]") == SlurmJob(
        id="7", name="tidemill-a", state="FAILED", reason="NonZeroExitCode", nodes="n[1-2]", node_count=2, cpus=4,
        memory_bytes=300 << 20, gpus=1,
    )  # fmt: skip
    assert slurmdocuments.ended(document, "jobs[0]") == Ending(
        job="7", state="FAILED", code="0:9", nodes="n[1-2]", reason="NonZeroExitCode", ran_s=61
    )


@pytest.mark.parametrize(
    ("told", "state"),
    [
        ("RUNNING", "RUNNING"),
        (["RUNNING"], "RUNNING"),
        (["RUNNING", "CONFIGURING"], "CONFIGURING"),
        (["CANCELLED", "COMPLETING"], "COMPLETING"),
        (["RUNNING", "RESIZING"], "RUNNING"),
        (["REQUEUED", "PENDING"], "PENDING"),
        (["NODE_FAIL"], "NODE_FAIL"),
    ],
)
def test_of_many_words_for_a_state_that_counts_which_says_whether_it_lives(told: object, state: str) -> None:
    assert slurmdocuments.job({**JOB_42, "job_state": told}, "jobs[0]").state == state


def test_memory_that_is_asked_for_each_cpu_is_that_of_the_cpus_of_a_node() -> None:
    document = {**JOB_42, "memory_per_node": NOT_SET, "memory_per_cpu": number(100)}
    assert slurmdocuments.job(document, "jobs[0]").memory_bytes == 200 << 20


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (0, "0:0"),
        (768, "3:0"),
        (9, "0:9"),
        (number(256), "1:0"),
        (None, "0:0"),
        ({"status": ["SUCCESS"], "return_code": number(0), "signal": {"id": NOT_SET, "name": ""}}, "0:0"),
        ({"status": "ERROR", "return_code": 3}, "3:0"),
        ({"status": "SIGNALED", "return_code": None, "signal": {"signal_id": 15, "name": "TERM"}}, "0:15"),
    ],
)
def test_an_exit_code_is_read_in_all_its_shapes(code: object, expected: str) -> None:
    assert slurmdocuments.ended({**JOB_42, "exit_code": code}, "jobs[0]").code == expected


def test_a_node_is_read_the_same_in_all_versions() -> None:
    old = {
        "name": "n2", "state": "idle", "state_flags": ["DRAIN"], "partitions": ["main"], "address": "10.0.0.2",
        "boot_time": 0, "cpus": 4, "real_memory": 2000, "temporary_disk": 10, "gres": "gpu:h100:2",
        "gres_used": "gpu:h100:1(IDX:0)", "alloc_cpus": 2, "alloc_memory": 300,
    }  # fmt: skip
    new = {**old, "state": ["IDLE", "DRAIN"], "state_flags": None, "partitions": ["main", "few"], "boot_time": NOT_SET}
    listed: list[dict[str, Any]] = [
        {"name": "main", "nodes": "n[1-3]"},
        {"name": "few", "nodes": {"configured": "n[2-3]"}},
    ]
    by_node = slurmdocuments.partitions_by_node(listed)
    assert slurmdocuments.node(old, "nodes[0]", by_node) == slurmdocuments.node(new, "nodes[0]", None)
    assert slurmdocuments.node(new, "nodes[0]", None) == SlurmNode(
        name="n2", states=frozenset({"IDLE", "DRAIN"}), partitions=("main", "few"), address="10.0.0.2", boot="None",
        cpus=4, memory_mib=2000, disk_mib=10, gres="gpu:h100:2", held=Held(cpus=2, memory_bytes=300 << 20, gpus=1),
    )  # fmt: skip


def test_what_the_accounting_says_is_read_the_same_in_all_versions() -> None:
    old = {
        "job_id": 7, "name": "work", "state": {"current": "CANCELLED", "reason": "None"}, "nodes": "n[1-2]",
        "exit_code": {"status": "SIGNALED", "return_code": None, "signal": {"signal_id": 15, "name": "TERM"}},
        "time": {"elapsed": 61, "total": {"seconds": 62, "microseconds": 345}},
    }  # fmt: skip
    code = {"status": ["SIGNALED"], "return_code": NOT_SET, "signal": {"id": number(15), "name": "TERM"}}
    new = {**old, "state": {"current": ["CANCELLED"], "reason": "None"}, "exit_code": code}
    expected = Ending(job="7", state="CANCELLED", code="0:15", nodes="n[1-2]", ran_s=61, cpu_used_ns=62_000_000_000)
    assert [slurmdocuments.accounted(each, "jobs[0]") for each in (old, new)] == [expected, expected]


ASKED = Submission(
    name="tidemill-a", comment="job_1", script="#!/bin/sh\n", folder="/shared", nodes=2, cpus=3, memory_mib=300,
    gpus=2, gpu_kind="h100", minutes=9, warning_s=60, options=(("partition", "few"), ("constraint", "a|b")),
)  # fmt: skip


def test_a_job_is_written_as_each_version_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurmdocuments, "surroundings", lambda: {"PATH": "/bin"})
    same = {
        "name": "tidemill-a", "comment": "job_1", "current_working_directory": "/shared", "standard_output": "/dev/null",
        "tasks": 2, "tasks_per_node": 1, "cpus_per_task": 3, "partition": "few", "constraints": "a|b",
    }  # fmt: skip
    old = {
        "nodes": "2-2", "environment": {"PATH": "/bin"}, "no_requeue": True, "memory_per_node": 300, "time_limit": 9,
        "signal": "TERM@60", "gres": "gpu:h100:2",
    }  # fmt: skip
    new = {
        "minimum_nodes": 2, "maximum_nodes": 2, "minimum_cpus": 6, "environment": ["PATH=/bin"], "requeue": False,
        "memory_per_node": number(300), "time_limit": number(9), "kill_warning_signal": "TERM",
        "kill_warning_flags": ["BATCH_JOB"], "kill_warning_delay": number(60), "tres_per_node": "gres/gpu:h100:2",
    }  # fmt: skip
    for version, own in ((37, old), (38, old), (40, new), (44, new), (39, new | {"tres_per_node": "gres:gpu:h100:2"})):
        assert slurmdocuments.submission(ASKED, version) == {"script": "#!/bin/sh\n", "job": same | own}, version
    least = replace(ASKED, memory_mib=0, gpus=0, minutes=0, warning_s=0, options=())
    for version in (38, 42):
        job = slurmdocuments.submission(least, version)["job"]
        left = ("memory", "gres", "tres", "time", "signal", "kill", "partition", "constraints")
        assert not [name for name in job if name.startswith(left)], "what is not asked for is Slurm's to choose"


# ------------------------------------------------------------------ which version


def description(*versions: int, without: str = "", slash: str = "", flags: bool = False) -> dict[str, Any]:
    kill = {"parameters": [{"name": "signal"}, *([{"name": "flags"}] if flags else [])]}
    paths = {
        f"/slurm/v0.0.{version}/{rest}{slash if '/' not in rest else ''}": {"delete": kill, "get": {}}
        for version in versions
        for rest in REST
        if rest != without
    }
    return {"openapi": "3.0.3", "paths": {"/openapi/v3": {"get": {}}, **paths}}


@pytest.mark.parametrize(
    ("document", "version", "signals_batch"),
    [
        (description(36, 37, 38), 38, False),
        (description(39, 40, 41, slash="/", flags=True), 41, True),
        (description(43, 44, 99, slash="/", flags=True), 44, True),
    ],
)
def test_the_newest_version_that_both_know_is_used(document: Any, version: int, signals_batch: bool) -> None:
    found = dialect_of(document)
    assert (found.version, found.accounting, found.signals_batch) == (version, 0, signals_batch)
    document["paths"][f"/slurmdb/v0.0.{version - 1}/job/{{job_id}}"] = {"get": {}}
    assert dialect_of(document).accounting == version - 1


@pytest.mark.parametrize(
    ("document", "there"),
    [
        (description(35, 36, 99), "v0.0.35, v0.0.36, v0.0.99"),
        (description(38, without="job/submit"), "none"),
        ({"paths": []}, "none"),
        ({}, "none"),
    ],
)
def test_a_server_of_which_no_version_is_known_is_refused_with_what_it_has(document: Any, there: str) -> None:
    with pytest.raises(EngineRefused, match=rf"it has {there}\.") as refused:
        dialect_of(document)
    assert refused.value.mend == "Known are v0.0.37 to v0.0.44: load one with slurmrestd -s or -d."


# ------------------------------------------------------------------ answers that are none


class Handler(BaseHTTPRequestHandler):
    """Answers what it is told to, by method and path; the description else."""

    protocol_version = "HTTP/1.1"
    answers: dict[str, tuple[int, bytes]]

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, content = self.answers.get(f"{self.command} {self.path}", (404, b"Unable find requested URL."))
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[tuple[SlurmRest, dict[str, tuple[int, bytes]]]]:
    handler = type("Own", (Handler,), {"answers": {"GET /openapi/v3": (200, json.dumps(description(42)).encode())}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    token = tmp_path / "token"
    token.write_text("abc")
    rest = SlurmRest(f"http://127.0.0.1:{server.server_address[1]}", user="root", token_file=str(token))
    yield rest, handler.answers  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def failed(code: int, words: str, name: str = "error_number") -> bytes:
    return json.dumps({"errors": [{name: code, "error": words}], "jobs": []}).encode()


JOBS_AT, SUBMIT_AT = "GET /slurm/v0.0.42/jobs", "POST /slurm/v0.0.42/job/submit"


@pytest.mark.parametrize(
    ("status", "content", "said"),
    [
        (200, b"<html>", "and no JSON: '<html>'"),
        (200, b"[]", "and no JSON"),
        (200, b"{}", "jobs is None, and not a list of objects"),
        (200, json.dumps({"jobs": [{**JOB_42, "cpus": "many"}]}).encode(), "jobs[0].cpus is 'many', and not a number"),
        (200, json.dumps({"jobs": [{**JOB_42, "job_state": []}]}).encode(), "jobs[0].job_state is [], and not a state"),
        (500, failed(-1, "Unspecified error", "errno"), "with: Unspecified error"),
        (500, b"{}", "with: 500"),
        (401, b"Authentication failure", "does not take us for 'root': 401"),
        (404, b"Unable find requested URL.", "knows no GET /slurm/v0.0.42/jobs"),
        (503, b"busy", "answers GET /slurm/v0.0.42/jobs with 503 and no JSON: 'busy'"),
    ],
)
def test_an_answer_that_is_none_is_no_news_and_says_where_it_came_from(
    peer: tuple[SlurmRest, dict[str, tuple[int, bytes]]], status: int, content: bytes, said: str
) -> None:
    rest, answers = peer
    answers[JOBS_AT] = (status, content)
    with pytest.raises(EngineLost) as lost:
        rest.jobs()
    assert said in str(lost.value)
    assert "/slurm/v0.0.42/jobs" in str(lost.value) or status == 401


@pytest.mark.parametrize(
    ("status", "content", "error", "said"),
    [
        (500, failed(2000, "Invalid partition name specified", "error_code"), EngineRefused, "Invalid partition name"),
        (400, failed(9001, "Failure during parsing", "error_code"), EngineRefused, "Failure during parsing"),
        (500, failed(1800, "Unable to contact slurm controller", "error_code"), EngineLost, "Unable to contact"),
        (500, failed(-1, "Unspecified error"), EngineLost, "Unspecified error"),
        (502, b"", EngineLost, "no JSON"),
        (200, b"{}", EngineLost, "job_id is None, and not the number of a job"),
    ],
)
def test_a_job_that_slurm_refuses_is_told_from_a_slurm_that_is_away(
    peer: tuple[SlurmRest, dict[str, tuple[int, bytes]]], status: int, content: bytes, error: type, said: str
) -> None:
    rest, answers = peer
    answers[SUBMIT_AT] = (status, content)
    with pytest.raises(error, match=said):
        rest.submit(ASKED)
    answers[SUBMIT_AT] = (200, b'{"job_id": 12, "errors": [{"error_code": 2014, "error": "not now"}]}')
    assert rest.submit(ASKED) == "12", "Slurm has it, and says that it will wait"


def test_a_job_that_slurm_does_not_know_is_no_error(peer: tuple[SlurmRest, dict[str, tuple[int, bytes]]]) -> None:
    rest, answers = peer
    answers["GET /slurm/v0.0.42/job/9"] = (500, failed(2017, "Invalid job id specified"))
    answers["DELETE /slurm/v0.0.42/job/9"] = (500, failed(2017, "Invalid job id specified"))
    assert rest.ended("9", "tidemill-a") is None
    rest.cancel("9")
    answers["GET /slurm/v0.0.42/job/9"] = (404, failed(2017, "Invalid job id specified"))
    answers["DELETE /slurm/v0.0.42/job/9"] = (204, b"")
    assert rest.ended("9", "tidemill-a") is None
    rest.cancel("9")
    answers["GET /slurm/v0.0.42/job/9"] = (500, failed(-1, "Unspecified error"))
    with pytest.raises(EngineLost):
        rest.ended("9", "tidemill-a")


def test_jobs_of_others_are_not_ours(peer: tuple[SlurmRest, dict[str, tuple[int, bytes]]]) -> None:
    rest, answers = peer
    theirs = {**JOB_42, "job_id": 8, "user_name": "eve", "user_id": 1001}
    nameless = {**JOB_42, "job_id": 9, "user_name": ""}
    answers[JOBS_AT] = (200, json.dumps({"jobs": [theirs, JOB_42, nameless]}).encode())
    assert [job.id for job in rest.jobs()] == ["7", "9"]
    assert rest.jobs("tidemill-b") == ()


# ------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    "address", ["unix:/run/slurmrestd.sock", "http://head:6820", "https://slurm.example.org/api", "http://[::1]:6820"]
)
def test_an_address_is_a_socket_or_a_url(address: str) -> None:
    assert checked_address(address) == address


@pytest.mark.parametrize(
    "address", ["", "head:6820", "unix:run/s", "ftp://head", "http://", "http://u:p@h", "http://h:x"]
)
def test_what_is_no_address_is_refused_with_what_is(address: str) -> None:
    with pytest.raises(InvalidSetting, match="It is no address of slurmrestd") as refused:
        checked_address(address)
    assert refused.value.field == "rest"


def test_over_http_a_token_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="wants a token"):
        SlurmRest("http://head:6820")
    missing = SlurmRest("http://head:6820", token_file=str(tmp_path / "none"))
    with pytest.raises(EngineLost, match="cannot be read"):
        missing.jobs()
    assert SlurmSettings().rest == "", "the commands are used unless somebody says otherwise"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("rest=head:6820",), "rest: It is no address of slurmrestd."),
        (("rest=http://head",), "rest_token: Over HTTP, slurmrestd wants a token."),
        (("rest_user=eve",), "rest_user: It is for slurmrestd."),
        (("rest=",), "slurm: Slurm sites have no such setting."),
        (("socket=/run/s",), "slurm: Slurm sites have no such setting."),
    ],
)
def test_who_joins_with_settings_that_do_not_fit_is_told_so_first(
    words: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [each for word in words for each in ("--slurm", word)]
    status = main.run(
        ["join", "127.0.0.1:9", "--token", "x", "--address", "127.0.0.1", "--home", str(tmp_path), *given]
    )
    assert (status, said in capsys.readouterr().err) == (2, True)
    assert not list(tmp_path.iterdir())
