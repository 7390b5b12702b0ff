"""Files of other tools, run by a real cloud as they are: they end well and find the variables they were written for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cloud import Cloud, free_port

EXAMPLES = Path(__file__).parents[2] / "examples" / "compat"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory) -> Iterator[Cloud]:
    made = Cloud(tmp_path_factory.mktemp("compat") / "home")
    made.up()
    yield made
    made.down()


def run(cloud: Cloud, folder: Path, *arguments: str) -> tuple[int, str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TIDEMILL_")}
    environment |= {"TIDEMILL_HOME": str(cloud.home), "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tidemill.cli.main", *arguments],
        env=environment, cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def test_a_skypilot_task_finds_its_nodes(cloud, tmp_path):
    status, out, err = run(cloud, tmp_path, "run", str(EXAMPLES / "train.sky.yaml"))
    assert status == 0, err
    assert "is read as a SkyPilot task file" in err
    lines = sorted(out.splitlines())
    assert "0 │ node 0 of 2 with 0 GPUs trains 13b" in lines
    assert "1 │ node 1 of 2 with 0 GPUs trains 13b" in lines
    assert "1 │ preparing node 1" in lines
    assert "0 │ the first node is 127.0.0.1" in lines


def test_a_dstack_task_finds_its_nodes(cloud, tmp_path):
    status, out, err = run(cloud, tmp_path, "run", str(EXAMPLES / "train.dstack.yml"))
    assert status == 0, err
    assert "1 │ node 1 of 2 in dstack-hello trains 13b" in out.splitlines()
    assert "0 │ the first node is 127.0.0.1, with 0 of 0 GPUs" in out.splitlines()


def test_an_array_of_a_script_has_the_ids_of_slurm(cloud, tmp_path):
    status, out, err = run(cloud, tmp_path, "run", str(EXAMPLES / "sweep.sh"))
    assert status == 0, err
    assert "3 succeeded" in out
    _, jobs, _ = run(cloud, tmp_path, "ps", "--all", "--json")
    ids = sorted(job["id"] for job in json.loads(jobs) if job["name"].startswith("slurm-hello"))
    told = "".join(cloud.logs(job).decode() for job in ids)
    assert [line for line in told.splitlines() if line.startswith("task")] == [
        f"task {index} of 3 to 9 on 127.0.0.1" for index in (3, 6, 9)
    ]
    assert told.count("rank 0 of 1 with 1 CPU") == 3


def test_a_script_for_two_nodes_has_its_ranks(cloud, tmp_path):
    status, out, err = run(cloud, tmp_path, "run", str(EXAMPLES / "ranks.sh"))
    assert status == 0, err
    assert sorted(out.splitlines()) == [f"{rank} │ rank {rank} of 2 meets at 127.0.0.1" for rank in (0, 1)]


SCRIPT = """#!/bin/bash -l
#SBATCH -n 1 -t 5
false; echo "unset: $NO_SUCH_VARIABLE."
cat data.txt
(( SLURM_JOB_ID % 1000 < 1000 )) && [ "$SLURM_JOBID" = "$SLURM_JOB_ID" ] && echo "a number"
cd / && cd "$SLURM_SUBMIT_DIR" && ls data.txt
srun -N1 -n 1 --mpi=pmix -l --export=ALL bash -c 'echo "$1" "$2"' - "two  words" end
exit 3
"""


def test_a_login_shell_goes_on_after_what_fails_and_ends_as_the_script_says(cloud, tmp_path):
    (tmp_path / "job").write_text(SCRIPT)
    (tmp_path / "data.txt").write_text("taken along\n")
    status, out, err = run(cloud, tmp_path, "run", "job")
    assert status == 3, err
    lines = ["unset: .", "taken along", "a number", "data.txt", "two  words end"]
    assert [line for line in out.splitlines() if line in lines] == lines, out


def test_a_script_of_another_language_is_run_by_it(cloud, tmp_path):
    (tmp_path / "job.py").write_text(
        "#!/usr/bin/env python3\n#SBATCH --job-name=snake --array=5\nimport os, sys\n"
        "print('python', os.environ['SLURM_ARRAY_TASK_ID'], os.environ['SLURM_ARRAY_TASK_COUNT'], len(sys.argv))\n"
    )
    status, out, err = run(cloud, tmp_path, "run", "job.py")
    assert status == 0, err
    assert "python 5 1 1" in out


def test_commands_of_dstack_end_at_the_first_that_fails(cloud, tmp_path):
    (tmp_path / ".dstack.yml").write_text(
        "type: task\nresources: {cpu: 1}\nenv: [GIVEN_HERE]\ncommands:\n"
        '  - export KEPT=yes\n  - echo "kept $KEPT $GIVEN_HERE"\n  - |\n    false\n    (exit 4)\n  - echo never\n'
    )
    status, out, err = run(cloud, tmp_path, "run", ".dstack.yml", "--env", "GIVEN_HERE=on")
    assert status == 4, err
    assert out.splitlines() == ["kept yes on"]


def test_a_service_of_skypilot_gets_ready_at_its_port(cloud, tmp_path):
    port = free_port()
    (tmp_path / "serve.yaml").write_text(
        f"run: python3 -m http.server --bind 127.0.0.1 {port}\nresources: {{ports: {port}}}\n"
        "service: {readiness_probe: /, replicas: 1}\n"
    )
    status, out, err = run(cloud, tmp_path, "run", "serve.yaml")
    assert status == 0, err
    assert f"ready serve at http://127.0.0.1:{port}" in out or f":{port}" in out
    assert run(cloud, tmp_path, "stop", "serve")[0] == 0


def test_pip_has_an_environment_of_the_worker_to_install_into(cloud, tmp_path):
    (tmp_path / "task.yaml").write_text(
        "num_nodes: 1\nsetup: pip --version > version\nrun: |\n  cat version; command -v pip\n"
        "  touch $(python -c 'import sysconfig; print(sysconfig.get_path(\"purelib\"))')/here.py && python -c 'import here'\n"
        "  [ ~/sky_workdir/version -ef version ] && echo same folder\n"
    )
    status, out, err = run(cloud, tmp_path, "run", "task.yaml")
    assert status == 0, err + out
    assert "/scratch/python/lib/" in out.splitlines()[0] or "/python/lib/" in out.splitlines()[0]
    assert out.splitlines()[1].endswith("/python/bin/pip")
    assert out.splitlines()[2] == "same folder"


def test_what_is_refused_is_not_submitted_and_says_why(cloud, tmp_path):
    (tmp_path / "task.yaml").write_text("run: echo hi\nnum_nodes: 1\nresources:\n  instance_type: p4d.24xlarge\n")
    status, out, err = run(cloud, tmp_path, "run", "task.yaml")
    assert (status, out) == (2, "")
    assert "task.yaml:4: resources.instance_type: It names a machine of one cloud." in err
    assert "Say what is needed of it" in err
