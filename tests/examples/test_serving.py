"""The services to start from: each is a workload file that has room on the machines that it is for, and flags that fit it."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import openai
import pytest
from tests.cloud import Cloud
from tests.core.yard import GB, Yard, gpu_node

from tidemill.core.admission import why_refused
from tidemill.model.ids import OrganizationId, PrincipalId, ProjectId, WorkloadId
from tidemill.model.job import Workload
from tidemill.model.spec import WorkloadSpec
from tidemill.sdk import specfile
from tidemill.wire import read_spec
from tidemill.wire.schema import json_schema

FOLDER = Path(__file__).parents[2] / "examples" / "serving"
RECIPES = sorted(FOLDER.rglob("*.yaml"))
FLAGS = {
    "vllm": ("--served-model-name", "--max-num-seqs"),
    "sglang": ("--served-model-name", "--max-running-requests"),
    "sglang-two-machines": ("--served-model-name", "--max-running-requests"),
    "llama-cpp": ("--alias", "--parallel"),
}


def spec_of(path: Path) -> WorkloadSpec:
    plain = dict(specfile.load(path).spec)
    plain.pop("workdir", None)
    return read_spec(plain, path.stem)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_is_a_service_that_machines_with_its_gpus_can_run(path: Path) -> None:
    jsonschema.validate(dict(specfile.load(path).spec), json_schema())
    spec = spec_of(path)
    assert spec.service is not None
    assert spec.service.readiness_path
    assert spec.service.liveness_pace is not None
    made = Yard(nodes=tuple(gpu_node(name, 8, images=True, memory_bytes=1024 * GB) for name in "ab"))
    workload = Workload(
        id=WorkloadId("wl_1"),
        organization_id=OrganizationId("o"),
        project_id=ProjectId("p0"),
        principal_id=PrincipalId("u"),
        spec=spec,
        submitted_ns=made.now,
    )
    assert why_refused(made.world, workload) is None


@pytest.mark.parametrize("name", FLAGS)
def test_what_the_gateway_is_told_is_what_the_engine_is_told(name: str) -> None:
    spec = spec_of(FOLDER / f"{name}.yaml")
    assert spec.service is not None
    given = dict(re.findall(r"(--[a-z-]+)[ =]+(\S+)", spec.run.replace("\\\n", " ")))
    alias, most = FLAGS[name]
    assert given[alias] == spec.service.model
    assert int(given[most]) == spec.service.concurrency
    assert given["--port"].strip('"') == "$PORT"
    assert given["--host"] == "0.0.0.0"
    assert not {"--api-key", "--api-keys"} & given.keys(), "keys are the gateway's"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    made = Cloud(tmp_path_factory.mktemp("recipes") / "home")
    made.up()
    yield made
    made.down()


@pytest.mark.long
def test_a_packaged_model_embeds_for_the_official_client(cloud: Cloud) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tidemill.cli.main", "run", str(FOLDER / "minilm" / "serve.yaml")],
        env={"PATH": "/usr/bin:/bin", "TIDEMILL_API_URL": f"http://127.0.0.1:{cloud.port}", "TIDEMILL_TOKEN": cloud.token},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{cloud.gateway_port}/v1", api_key=cloud.token)
    texts = ["A man is eating food.", "A man is eating a piece of bread.", "The girl is carrying a baby."]
    found = client.embeddings.create(model="minilm", input=texts)
    vectors = [one.embedding for one in found.data]
    assert {len(vector) for vector in vectors} == {384}
    alike, other = (sum(a * b for a, b in zip(vectors[0], vectors[n], strict=True)) for n in (1, 2))
    print(f"{alike:.3f} {other:.3f}, {found.usage.prompt_tokens} tokens")
    assert alike == pytest.approx(0.755, abs=0.005), "what its authors print for these two"
    assert other < 0.1
    assert found.usage.prompt_tokens == found.usage.total_tokens > 20
    with pytest.raises(openai.BadRequestError, match="none of them empty"):
        client.embeddings.create(model="minilm", input=[""])
