"""What values of other tools become, whose file a file is, and what the command line says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tidemill.cli import main
from tidemill.errors import InvalidRequest, InvalidSpec, NotFound, TooLarge
from tidemill.sdk import compat, specfile
from tidemill.sdk.compat import sbatch_values as values
from tidemill.sdk.compat.mapping import Refuse, Tool

NOW_NS = 1_800_000_000_000_000_000  # 2027-01-15T08:00:00Z, a Friday
AROUND = compat.Surroundings(now_ns=NOW_NS, offset_s=3_600, environ={"FROM_HERE": "here"}, given={"ON_LINE": "1"})


def reading(text: str | dict[str, Any], name: str = "file.yaml", tool: Tool | None = None) -> compat.Reading:
    octets = (yaml.safe_dump(text, sort_keys=False) if isinstance(text, dict) else text).encode()
    return compat.parse(octets, source=name, folder=Path("there"), tool=tool, surroundings=AROUND)


def sky(**fields: Any) -> compat.Translation:
    found = reading({"run": "x", **fields}, tool=Tool.SKYPILOT).translation
    assert found is not None
    return found


def dstack(**fields: Any) -> compat.Translation:
    found = reading({"type": "task", "commands": ["x"], **fields}).translation
    assert found is not None
    return found


def script(*options: str, body: str = "true", first: str = "#!/bin/bash") -> compat.Translation:
    lines = "\n".join(f"#SBATCH {option}" for option in options)
    found = reading(f"{first}\n{lines}\n{body}\n", tool=Tool.SLURM).translation
    assert found is not None
    return found


def refusals(found: compat.Translation) -> dict[str, str]:
    return {one.field: f"{one.reason} {one.instead}" for one in found.refused}


# --- whose file it is ---


@pytest.mark.parametrize(
    ("text", "name", "tool"),
    [
        ("run: echo hi", "a.yaml", Tool.TIDEMILL),
        ("kind: service\nrun: x\nservice: {port: 8000, replicas: 2}", "a.yaml", Tool.TIDEMILL),
        ("run: x\nresources: {gpus: 'H100:8', cpus: 4, memory: 32GB, any_of: [{gpus: A100}]}", "a.yaml", Tool.TIDEMILL),
        ("run: x\nsecrets: [HF_TOKEN]\ninputs: {model: gpt}", "a.yaml", Tool.TIDEMILL),
        ("run: x\nnum_nodes: 2", "a.yaml", Tool.SKYPILOT),
        ("run: x\nresources: {accelerators: 'H100:8'}", "a.yaml", Tool.SKYPILOT),
        ("run: x\nresources: {cpus: 4+}", "a.yaml", Tool.SKYPILOT),
        ("run: x\nsecrets: {HF_TOKEN: null}", "a.yaml", Tool.SKYPILOT),
        ("run: x\nfile_mounts: {/data: s3://data}", "a.yaml", Tool.SKYPILOT),
        ("run: x\nservice: {readiness_probe: /health, replicas: 2}", "a.yaml", Tool.SKYPILOT),
        ("---\n# a header\nrun: x\nnum_nodes: 2\n", "a.yaml", Tool.SKYPILOT),
        ("type: task\ncommands: [x]", "a.yaml", Tool.DSTACK),
        ("commands: [x]", "train.dstack.yml", Tool.DSTACK),
        ("#!/bin/sh\n#SBATCH -n1\nx", "job", Tool.SLURM),
        ("#!/usr/bin/env python3\n#SBATCH -n1\nx", "job.py", Tool.SLURM),
    ],
)
def test_a_file_is_taken_for_what_its_fields_say(text, name, tool):
    found = reading(text, name)
    assert (found.tool, found.doubt) == (tool, "")
    assert (found.translation is None) == (tool is Tool.TIDEMILL)


@pytest.mark.parametrize(
    ("text", "doubt"),
    [
        ("run: x\nnodes: 2\nnum_nodes: 2", "it has nodes, which is Tidemill's, and num_nodes, which is SkyPilot's"),
        (
            "run: x\nresources: {memory: 32}",
            "resources.memory is a number, which is bytes for Tidemill and GB for SkyPilot",
        ),
    ],
)
def test_what_could_be_either_is_read_as_ours_and_said(text, doubt):
    assert (reading(text).tool, reading(text).doubt) == (Tool.TIDEMILL, doubt)
    assert reading(text, tool=Tool.SKYPILOT).tool is Tool.SKYPILOT


def test_several_documents_are_a_pipeline_and_refused():
    found = reading("name: a\nrun: x\nnum_nodes: 1\n---\nname: b\nrun: y\n").translation
    assert "after: [NAME]" in refusals(found)["document 2"]


def test_a_yaml_mistake_is_told_with_its_line():
    with pytest.raises(InvalidSpec, match=r"file.yaml:3:"):
        reading("run: x\nnum_nodes: 2\nnum_nodes: 3\n")


def test_what_is_no_file_of_text_is_told_as_that(tmp_path):
    with pytest.raises(InvalidSpec, match="is a folder"):
        compat.load(tmp_path)
    with pytest.raises(NotFound):
        compat.load(tmp_path / "none.sh")
    for octets, error in ((b"\0", InvalidSpec), (b"\xff", InvalidSpec), (b"x" * 1_000_001, TooLarge)):
        with pytest.raises(error):
            compat.parse(b"#!/bin/sh\n#SBATCH -n1\n" + octets, source="a", folder=tmp_path)


# --- SkyPilot ---


@pytest.mark.parametrize(
    ("wanted", "gpus", "others"),
    [
        ("H100:8", "H100:8", []),
        ("H100", "H100:1", []),
        ("A100-80GB:2", "A100-80GB:2", []),
        ("V100-32GB:4", "V100:32GB:4", []),
        ({"L4": 0.5}, "L4:0.5", []),
        (["L4:1", "A100:1"], "L4:1", ["A100:1"]),
        ({"L4:1": None, "A100:2": None}, "L4:1", ["A100:2"]),
        ("{L4:1, A100:2}", "L4:1", ["A100:2"]),
        ({"V100": 8, "T4": 4}, "V100:8", ["T4:4"]),
    ],
)
def test_accelerators_become_gpus(wanted, gpus, others):
    found = sky(resources={"accelerators": wanted})
    assert found.refused == ()
    assert found.spec["resources"]["gpus"] == gpus
    assert [one["gpus"] for one in found.spec["resources"].get("any_of", [])] == others


def test_a_gpu_that_nobody_knows_is_refused_with_the_nearest():
    assert "Did you mean A100" in refusals(sky(resources={"accelerators": "A1000-80:1"}))["resources.accelerators"]
    assert "TPU" in refusals(sky(resources={"accelerators": "tpu-v5e-8"}))["resources.accelerators"]


def test_candidates_become_alternatives_or_places():
    found = sky(
        resources={
            "cpus": "4+",
            "any_of": [{"accelerators": "H100:8"}, {"accelerators": ["A100:8", "L4:8"], "cpus": 16}],
        }
    )
    assert found.spec["resources"] == {
        "cpus": 4, "gpus": "H100:8", "any_of": [{"gpus": "A100:8", "cpus": 16}, {"gpus": "L4:8", "cpus": 16}],
    }  # fmt: skip
    found = sky(
        resources={"accelerators": "H100", "ordered": [{"infra": "aws/us-east-1"}, {"infra": "gcp/us-central1"}]}
    )
    assert found.spec["placement"] == {"labels": {"cloud": "aws|gcp", "region": "us-east-1|us-central1"}}
    assert found.spec["resources"] == {"gpus": "H100:1"}


def test_candidates_go_over_what_stands_beside_them_wherever_it_stands():
    found = sky(
        resources={
            "any_of": [
                {"accelerators": "H100:8", "cpus": 16, "use_spot": True, "labels": {"b": "2"}},
                {"accelerators": "A100:8", "use_spot": True, "labels": {"b": "2"}},
                {"cpus": 16, "memory": 64, "use_spot": True, "labels": {"b": "2"}},
            ],
            "accelerators": "L4:1", "cpus": 4, "use_spot": False, "labels": {"a": "1"}, "disk_size": 100,
        }
    )  # fmt: skip
    assert refusals(found) == {}
    assert found.spec["resources"] == {
        "gpus": "H100:8", "cpus": 16, "disk": "100GB",
        "any_of": [{"gpus": "A100:8", "cpus": 4}, {"gpus": "L4:1", "memory": "64GB"}],
    }  # fmt: skip
    assert found.spec["labels"] == {"a": "1", "b": "2"}
    assert found.spec["capacity"] == "spot"
    found = sky(resources={"any_of": [{"cpus": 1}], "ordered": [{"cpus": 2}]})
    assert list(refusals(found)) == ["resources.ordered"]


@pytest.mark.parametrize(
    ("candidates", "why"),
    [
        ([{"use_spot": True}, {"use_spot": False}], "differ in capacity"),
        ([{"infra": "aws", "cpus": 1}, {"infra": "gcp", "cpus": 2}], "differ in hardware and in place"),
        ([{"infra": "aws"}, {"infra": "gcp/us-central1"}], "a narrower place than others"),
        ([], "is not a list of resources"),
    ],
)
def test_candidates_that_one_workload_cannot_have_are_refused(candidates, why):
    assert why in refusals(sky(resources={"any_of": candidates}))["resources.any_of"]


def test_a_candidate_without_an_equivalent_is_refused_by_name():
    found = sky(resources={"any_of": [{"accelerators": "L4"}, {"instance_type": "p4d"}]})
    assert list(refusals(found)) == ["resources.any_of[1].instance_type"]
    assert found.refused[0].line > 0


@pytest.mark.parametrize(
    ("recovery", "retry"),
    [
        ("none", {"max": 0}),
        ("FAILOVER", {"on": ["node_lost", "preempted"], "max": 1_000}),
        (
            {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 3},
            {"on": ["node_lost", "preempted", "error"], "max": 3},
        ),
        ({"recover_on_exit_codes": [33, 34]}, {"on": ["node_lost", "preempted", "exit:33", "exit:34"], "max": 1_000}),
    ],
)
def test_recovery_becomes_retry(recovery, retry):
    assert sky(resources={"job_recovery": recovery}).spec["retry"] == retry


def test_variables_without_a_value_are_asked_for():
    found = sky(envs={"ON_LINE": None, "HERE": None, "FROM_HERE": None, "SET": "3.10"})
    assert "--env HERE=VALUE" in refusals(found)["envs.HERE"]
    assert "--env FROM_HERE, which takes the value from here" in refusals(found)["envs.FROM_HERE"]
    assert "envs.ON_LINE" not in refusals(found)
    assert found.spec["envs"] == {"SET": "3.10"}


def test_a_service_has_its_port_and_as_much_time_to_get_ready():
    found = sky(resources={"ports": "8080"}, service={"readiness_probe": "/v1/models", "replicas": 2})
    assert found.refused == ()
    assert found.spec["service"] == {
        "readiness": {"path": "/v1/models", "timeout": "1200s"},
        "replicas": 2,
        "port": 8080,
    }


def sky_service(**policy: Any) -> compat.Translation:
    return sky(resources={"ports": 8080}, service={"readiness_probe": "/", "replica_policy": policy})


@pytest.mark.parametrize(
    ("policy", "replicas", "idle"),
    [
        ({"min_replicas": 2}, 2, None),
        ({"min_replicas": 2, "max_replicas": 2}, 2, None),
        ({"min_replicas": 1, "max_replicas": 3}, "1..3", "1200s"),
        ({"max_replicas": 3}, "1..3", "1200s"),
        ({"downscale_delay_seconds": 60, "min_replicas": 0, "max_replicas": 3}, "0..3", "60s"),
    ],
)
def test_a_policy_of_replicas_is_a_range(policy, replicas, idle):
    found = sky_service(**policy).checked()
    assert found.refused == ()
    assert (found.spec["service"]["replicas"], found.spec["service"].get("idle")) == (replicas, idle)


def test_what_follows_from_a_rate_is_refused_by_name():
    refused = refusals(sky_service(min_replicas=1, max_replicas=3, target_qps_per_replica=2.5))
    assert list(refused) == ["service.replica_policy.target_qps_per_replica"]
    assert "service.concurrency" in refused["service.replica_policy.target_qps_per_replica"]
    refused = refusals(dstack(type="service", port=8000, replicas="1..4", scaling={"metric": "rps", "target": 10}))
    assert list(refused) == ["scaling.metric", "scaling.target"]
    assert (
        "max_replicas: 4"
        in refusals(sky_service(min_replicas=4, max_replicas=3))["service.replica_policy.max_replicas"]
    )


@pytest.mark.parametrize(
    ("given", "replicas", "idle"),
    [
        ({"replicas": "0..4"}, "0..4", "10m"),
        ({"replicas": {"min": 0, "max": 4}}, "0..4", "10m"),
        ({"replicas": "2..2"}, 2, None),
        ({"scaling": {"scale_down_delay": "90s"}, "replicas": "1..4"}, "1..4", "90s"),
        ({"replicas": "1..4", "scaling": {"scale_down_delay": "90s"}}, "1..4", "90s"),
    ],
)
def test_a_range_of_replicas_of_dstack_is_ours(given, replicas, idle):
    found = dstack(type="service", port=8000, **given).checked()
    assert found.refused == ()
    assert (found.spec["service"]["replicas"], found.spec["service"].get("idle")) == (replicas, idle)


@pytest.mark.parametrize("replicas", ["4..1", "1..", 0, "0..0", 65])
def test_a_range_of_replicas_that_cannot_be_is_refused(replicas):
    assert "replicas" in refusals(dstack(type="service", port=8000, replicas=replicas))


def test_a_cluster_without_a_program_is_a_worker_to_attach_to():
    found = reading({"num_nodes": 1}, tool=Tool.SKYPILOT).translation
    assert found.spec["kind"] == "dev"


# --- dstack ---


@pytest.mark.parametrize(
    ("wanted", "gpus", "others"),
    [
        (2, "2", []),
        ("A100:80GB:2", "A100:80GB:2", []),
        ("nvidia:A100,H100:2", "A100:2", ["H100:2"]),
        ("24GB..", "24GB+:1", []),
        ("16GB..48GB:2", "16GB..48GB:2", []),
        ("40GB", "40GB..40GB:1", []),
        ("1..4", "1", []),
        ("0", "none", []),
        ("amd:MI300X:8", "MI300X:8", []),
        ({"name": ["A100", "H100"], "memory": "40GB..", "count": 2}, "A100:40GB+:2", ["H100:40GB+:2"]),
        ({"count": {"min": 2, "max": 4}}, "2", []),
    ],
)
def test_gpu_becomes_gpus(wanted, gpus, others):
    found = dstack(resources={"gpu": wanted})
    assert refusals(found) == {}
    assert found.spec["resources"]["gpus"] == gpus
    assert [one["gpus"] for one in found.spec["resources"].get("any_of", [])] == others


def test_secrets_of_dstack_are_secrets_here():
    found = dstack(env=["A=1", "HF_TOKEN=${{ secrets.HF_TOKEN }}", "KEY=${{ secrets.other }}", "FROM_HERE"])
    assert found.spec["envs"] == {"A": "1", "FROM_HERE": "here"}
    assert found.spec["secrets"] == ["HF_TOKEN", "other"]
    assert 'export KEY="$other"' in found.spec["run"]
    assert "alone" in refusals(dstack(env={"A": "x ${{ secrets.a }}"}))["env.A"]


@pytest.mark.parametrize(
    ("given", "retry"),
    [
        (True, {"on": ["node_lost", "preempted", "error"], "max": 1_000}),
        (False, {"max": 0}),
        ({"on_events": ["interruption"]}, {"on": ["node_lost", "preempted"], "max": 1_000}),
        ({"on_events": ["no-capacity"]}, {"max": 0}),
        (None, {"max": 0}),
    ],
)
def test_retry_of_dstack(given, retry):
    assert dstack(**({"retry": given} if given is not None else {})).spec["retry"] == retry


def test_a_wait_for_capacity_is_bounded_by_its_duration():
    found = dstack(retry={"on_events": ["no-capacity"], "duration": "2h"})
    assert found.spec["start_before"] == "in 2h"
    assert "retry.duration" in refusals(dstack(retry={"on_events": ["error"], "duration": "2h"}))


def test_a_dev_environment_and_a_service():
    found = reading(
        {"type": "dev-environment", "ide": "vscode", "init": ["pip install x"], "python": "3.10"}
    ).translation
    assert found.refused == ()
    assert (found.spec["kind"], found.spec["env"]) == ("dev", {"python": "3.10"})
    assert found.spec["setup"].endswith("pip install x")
    service = {
        "type": "service",
        "commands": ["serve"],
        "port": "80:8000",
        "model": "llama",
        "replicas": 2,
        "image": "vllm/vllm-openai",
    }
    found = reading({**service, "probes": [{"type": "http", "url": "/health", "interval": "5s"}]}).translation
    assert found.refused == ()
    assert found.spec["service"] == {"port": 8000, "model": "llama", "replicas": 2, "readiness": {"path": "/health"}}


def test_fields_of_another_type_are_refused():
    assert "Write type: service" in refusals(dstack(port=8000))["port"]
    assert "Machines are named in config.yaml" in refusals(reading({"type": "fleet", "nodes": 2}).translation)["type"]


def test_files_at_their_own_paths_are_the_folder():
    found = dstack(files=["train.py", "src:src", {"local_path": "a/b", "path": "a/b"}])
    assert (found.spec["workdir"], found.folder) == (".", Path("there"))
    assert "files" in refusals(dstack(files=["../x:/y"]))


# --- sbatch ---


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5_400),
        ("1:30", 90),
        ("2:00:00", 7_200),
        ("1-12", 129_600),
        ("1-0:30", 88_200),
        ("0-0:0:5", 5),
        ("UNLIMITED", 0),
    ],
)
def test_times_of_slurm(text, seconds):
    assert values.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "x", "1h", "1-", "1:2:3:4", "-5"])
def test_what_is_no_time_of_slurm(text):
    with pytest.raises(Refuse):
        values.seconds_of(text)


@pytest.mark.parametrize(
    ("text", "ids", "parallel", "step"),
    [
        ("0-3", (0, 1, 2, 3), 0, 1),
        ("1-9:4%2", (1, 5, 9), 2, 4),
        ("3,1,7", (1, 3, 7), 0, 0),
        ("4", (4,), 0, 1),
        ("0-1,8-9", (0, 1, 8, 9), 0, 0),
    ],
)
def test_arrays_of_slurm(text, ids, parallel, step):
    found = values.array_of(text)
    assert (found.ids, found.parallel, found.step) == (ids, parallel, step)


@pytest.mark.parametrize(
    ("text", "when"),
    [
        ("now+2hours", "in 7200s"),
        ("2027-03-01T09:00", "2027-03-01T08:00:00Z"),
        ("2027-03-01", "2027-02-28T23:00:00Z"),
        ("16:00", "2027-01-15T15:00:00Z"),
        ("8:30", "2027-01-16T07:30:00Z"),
        ("4:15 PM", "2027-01-15T15:15:00Z"),
        ("noon", "2027-01-15T11:00:00Z"),
        ("tomorrow", "2027-01-16T08:00:00Z"),
        ("03/01/27", "2027-02-28T23:00:00Z"),
    ],
)
def test_begin_is_in_local_time(text, when):
    assert values.moment_of(text, now_ns=NOW_NS, offset_s=3_600) == when


SRUN = "export A=1\nmodule load cuda\nsrun --mpi=pmix python train.py --lr 1"


@pytest.mark.parametrize(
    ("options", "body", "nodes", "resources"),
    [
        (["-n 1 -c 4 --mem=8G"], "make", None, {"cpus": 4, "memory": "8GB"}),
        (["-n 8 --mem-per-cpu=1G"], "make -j8", None, {"cpus": 8, "memory": "8GB"}),
        (["-N 1 --ntasks-per-node=4 --gpus-per-task=1"], "mpirun -n 4 a", None, {"cpus": 4, "gpus": "4"}),
        (["-N 2 --ntasks-per-node=4 --gres=gpu:a100:4 --mem=64G -c 2"], SRUN, 8, {"cpus": 2, "gpus": "a100:1", "memory": "16GB"}),
        (["-N 2 --gpus-per-node=h100:8 --cpus-per-gpu=4"], SRUN, 2, {"cpus": 32, "gpus": "h100:8"}),
        (["-N 4 --gpus=8 --mem-per-gpu=10G"], SRUN, 4, {"cpus": 1, "gpus": "2", "memory": "20GB"}),
        (["-N 2-4 --gpus-per-node=1"], SRUN, "2..4", {"cpus": 1, "gpus": "1"}),
        (["--gpus=1 -C 'a100|h100'"], "x", None, {"cpus": 1, "gpus": "a100:1", "any_of": [{"gpus": "h100:1"}]}),
        (["--mincpus=8"], "x", None, {"cpus": 8}),
        (["-n 4 -G 4"], SRUN, 4, {"cpus": 1, "gpus": "1"}),
    ],
)  # fmt: skip
def test_tasks_become_workers_when_srun_starts_them(options, body, nodes, resources):
    found = script(*options, body=body)
    assert refusals(found) == {}
    assert found.spec.get("nodes") == nodes
    assert found.spec["resources"] == resources


@pytest.mark.parametrize(
    ("options", "body", "field", "why"),
    [
        ("-N 2", "python train.py", "--nodes", "runs once, on the first node"),
        ("-N 2", "mpirun ./a", "--nodes", "needs the Slurm engine"),
        ("-n 4", "python prepare.py\nsrun python train.py", "--ntasks", "line 3 (python prepare.py) must happen once"),
        ("-n 4", "srun a\nsrun b", "--ntasks", "line 4 (srun b) must happen once"),
        ("-n 4", "for i in 1 2; do srun a; done", "--ntasks", "must happen once"),
        ("-n 4", "cp a b; srun a", "--ntasks", "must happen once"),
        ("-n 4", "export MASTER_ADDR=$(hostname)\nsrun a", "--ntasks", "line 3 (export MASTER_ADDR=$(hostname))"),
        ("-n 4", "export PORT=$((20000 + RANDOM % 9000))\nsrun a", "--ntasks", "line 3"),
        ("-n 4", "X=`shuf -i 1-9 -n 1`\nsrun a", "--ntasks", "line 3"),
        ("-n 4", "echo hi | tee log | python prepare.py\nsrun a", "--ntasks", "line 3"),
        ("-n 2", "srun -n 1 a", "srun (line 3)", "a part of the job only"),
        ("-n 1", "srun --pty bash", "srun (line 3)", "Its option --pty"),
        ("-N 2 --gpus=3", SRUN, "--gpus", "not shared out evenly"),
        ("--mem=0", "x", "--mem", "all of a machine's memory"),
        ("--gres=shard:2", "x", "--gres", "gpus: 0.5"),
        ("-C bigmem", "x", "--constraint", "labels"),
        ("-d afterok:12345", "x", "--dependency", "a job's number in Slurm"),
        ("-d singleton", "x", "--dependency", "array.parallel: 1"),
        ("--signal=USR1@60", "x", "--signal", "SIGTERM"),
        ("--qos='a b'", "x", "--qos", "no name of Slurm's"),
        ("-t 5x", "x", "--time", "is not a time"),
        ("--array=9-1", "x", "--array", "is not an array"),
        ("--export=NOT_HERE", "x", "--export", "Write NOT_HERE=VALUE"),
    ],
)  # fmt: skip
def test_what_slurm_does_otherwise_is_refused_by_name(options, body, field, why):
    assert why in refusals(script(options, body=body))[field]


@pytest.mark.parametrize(
    "line",
    [
        'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "export MASTER_PORT=$(expr 10000 + $(echo -n $SLURM_JOBID | tail -c 4))",
        "export MASTER_PORT=$((10000 + SLURM_JOB_ID % 10000))",
        "source ~/.bashrc && conda activate 'my env'",
        'echo "started; on $(hostname) at $(date)"',
        "nodes=( $( scontrol show hostnames $SLURM_JOB_NODELIST ) )",
        "export A=1 B=2; ulimit -n 4096",
        "set -euo pipefail",
        "module purge",
    ],
)
def test_settings_that_are_the_same_everywhere_are_run_in_each_worker(line):
    found = script("-N 2", body=f"{line}\nsrun python train.py")
    assert refusals(found) == {}
    assert found.spec["nodes"] == 2


def test_lines_that_call_modules_are_told_of():
    told = {one.field: one for one in script("-n 1", body="module load cuda\npython x.py").mapped}
    assert told["module (line 3)"].value == "module load cuda"
    assert told["module (line 3)"].note


def test_what_has_to_end_before_and_how():
    assert script("-d afterok:prepare:fetch,afterany:clean").spec["after"] == {
        "ok": ["prepare", "fetch"],
        "any": ["clean"],
    }


def test_grace_is_taken_from_the_time():
    found = script("-t 1:00:00 --signal=B:TERM@300")
    assert (found.spec["max_duration"], found.spec["checkpoint"]) == ("55m", {"grace": "5m"})


def test_a_deadline_is_the_latest_start():
    assert script("--deadline=now+3hours -t 60").spec["start_before"] == "in 7200s"
    assert script("--deadline=2027-03-01T12:00 -t 60").spec["start_before"] == "2027-03-01T10:00:00Z"


def test_an_option_given_twice_and_one_below_the_first_command_are_told():
    found = script("-n 1", "-n 2", body="true\n#SBATCH --mem=1G")
    told = {one.field: one for one in found.mapped}
    assert "holds" in told["--ntasks (line 2)"].note
    assert told["--ntasks"].value == "2"
    assert told["--mem (line 5)"].is_noted
    assert "memory" not in found.spec["resources"]


def test_cut_short_and_commented_options_are_read():
    found = script("--job=train --cpus-per-t 4   # don't ask", "-t10 -J'my job' --comment='a # b' -Qv")
    assert refusals(found) == {}
    assert (found.spec["name"], found.spec["resources"]["cpus"], found.spec["max_duration"]) == ("my-job", 4, "10m")
    assert found.spec["labels"] == {"comment": "a # b"}
    assert {"--quiet", "--verbose"} <= {one.field for one in found.mapped}


# --- the command line ---


def tidemill(*arguments: str) -> int:
    return main.run(list(arguments))


EXAMPLES = sorted(
    path for path in (Path(__file__).parents[2] / "examples" / "compat").iterdir() if path.suffix != ".md"
)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_the_spec_that_is_printed_is_the_spec_that_is_run(path, capsys, tmp_path):
    assert tidemill("compat", str(path), "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert tidemill("compat", str(path), "--spec") == 0
    (tmp_path / "spec.yaml").write_text(capsys.readouterr().out)
    assert specfile.load(tmp_path / "spec.yaml").spec == shown["spec"]
    assert compat.load(tmp_path / "spec.yaml").tool is Tool.TIDEMILL
    assert tidemill("compat", str(path)) == 0
    out = capsys.readouterr().out
    assert all(entry["field"] in out for entry in shown["mapped"])


def test_refusals_end_the_command_with_2_and_say_where(tmp_path, capsys):
    (tmp_path / "a.sh").write_text("#!/bin/bash\n#SBATCH -N 1\n#SBATCH --exclusive\nx\n")
    for more in ((), ("--json",), ("--spec",)):
        assert tidemill("compat", str(tmp_path / "a.sh"), *more) == 2
        told = capsys.readouterr()
        assert "--exclusive" in told.out + told.err
    assert tidemill("run", "-d", str(tmp_path / "a.sh")) == 2
    assert "a.sh:3: --exclusive: Machines are shared" in capsys.readouterr().err


def test_what_the_control_plane_would_refuse_is_refused_here_with_the_name_it_has_there(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("run: x\nnum_nodes: 1\nresources:\n  disk_size: 9999999TB\n")
    assert tidemill("compat", str(tmp_path / "a.yaml")) == 2
    assert "line 4, resources.disk_size" in capsys.readouterr().out
    (tmp_path / "a.sh").write_text("#!/bin/sh\n#SBATCH -n 1\n#SBATCH --mem=9999999T\n#SBATCH --job-name=a\nx\n")
    assert tidemill("compat", str(tmp_path / "a.sh")) == 2
    assert "line 3, --mem" in capsys.readouterr().out


def test_from_decides_and_is_checked(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("run: x\nresources: {memory: 32}\n")
    assert tidemill("compat", str(tmp_path / "a.yaml")) == 0
    assert "bytes for Tidemill and GB for SkyPilot: --from decides" in capsys.readouterr().out
    assert tidemill("compat", str(tmp_path / "a.yaml"), "--from", "skypilot", "--json") == 0
    assert json.loads(capsys.readouterr().out)["spec"]["resources"]["memory"] == "32GB"
    assert tidemill("compat", str(tmp_path / "a.yaml"), "--from", "sky") == InvalidRequest.kind.exit_status
    assert "Tools are tidemill, skypilot, dstack, slurm." in capsys.readouterr().err


def test_a_mistake_that_the_control_plane_finds_is_shown_in_the_file_as_it_is():
    found = reading("name: a\nrun: x\n\nnum_nodes: 2\n")
    assert found.file.line_of("nodes") == 4
    assert found.file.line_of("resources.gpus") == 0


def test_volumes_of_other_tools_are_mounted_and_what_has_no_name_is_refused_with_the_mend() -> None:
    sky = compat.parse(b"run: ls\nvolumes:\n  /mnt/data: team\n", source="a.yaml", tool=Tool.SKYPILOT, folder=Path())
    assert sky.accepted().spec["volumes"] == [{"name": "team", "at": "/mnt/data"}]
    stack = b"type: task\nname: t\ncommands: [ls]\nvolumes: ['team:/mnt/data', {name: other, path: /other}]\n"
    found = compat.parse(stack, source="a.dstack.yml", tool=Tool.DSTACK, folder=Path())
    assert found.accepted().spec["volumes"] == [{"name": "team", "at": "/mnt/data"}, {"name": "other", "at": "/other"}]
    for tool, document, mend in (
        (Tool.DSTACK, b"type: task\nname: t\ncommands: [ls]\nvolumes: ['/home/x:/x']\n", "volume create NAME /home/x"),
        (Tool.SKYPILOT, b"run: ls\nvolumes:\n  /etc: team\n", "/mnt/x"),
        (Tool.SKYPILOT, b"run: ls\nfile_mounts:\n  /data: s3://bucket\n", "tidemill dataset add"),
    ):
        told = compat.parse(document, source="a.yaml", tool=tool, folder=Path()).translation
        assert told is not None
        assert any(mend in one.instead for one in told.refused), told
