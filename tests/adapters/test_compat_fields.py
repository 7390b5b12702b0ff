"""Files of other tools, field by field: whatever is in a file is mapped, noted or refused by name, and never dropped."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tidemill.sdk import compat
from tidemill.sdk.compat import mapping, sbatch
from tidemill.sdk.compat.mapping import ANY, Rule, Tool, leaves
from tidemill.wire import read_spec

TABLES = compat.tables()
NOW_NS = 1_800_000_000_000_000_000
AROUND = compat.Surroundings(now_ns=NOW_NS, environ={"FROM_HERE": "here"})


def translated(tool: Tool, document: Any) -> compat.Translation:
    text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
    reading = compat.parse(text.encode(), source="file", folder=Path(), tool=tool, surroundings=AROUND)
    assert reading.translation is not None
    return reading.translation


def entries(found: compat.Translation) -> dict[str, Any]:
    return {one.field: one for one in (*found.mapped, *found.refused)}


def read_by_us(spec: Mapping[str, Any]) -> Any:
    return read_spec({name: value for name, value in spec.items() if name != "workdir"}, "example", now=NOW_NS)


def nested(path: str, value: Any) -> dict[str, Any]:
    for part in reversed(path.split(".")):
        value = {"KEY" if part == ANY else part: value}
    return value


def merged(one: Any, other: Any) -> Any:
    """Both mappings; where both have something else than a mapping, the first stays."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one
    return {**one, **{key: merged(one[key], value) if key in one else value for key, value in other.items()}}


# --- each field alone ---

SERVICE = (
    "port",
    "gateway",
    "strip_prefix",
    "model",
    "https",
    "auth",
    "scaling",
    "rate_limits",
    "replicas",
    "probes",
    "groups",
)
DEV = ("ide", "version", "init", "inactivity_duration")


def base(tool: Tool, path: str) -> dict[str, Any]:
    """The least file in which that field means something."""
    top = path.split(".")[0]
    if tool is Tool.SKYPILOT:
        service = {"service": {"readiness_probe": "/"}, "resources": {"ports": 8080}}
        return {"run": "true", **(service if top == "service" else {})}
    if top in DEV:
        return {"type": "dev-environment"}
    return (
        {"type": "service", "commands": ["true"], "port": 8000}
        if top in SERVICE
        else {"type": "task", "commands": ["true"]}
    )


FIELDS = [
    pytest.param(tool, path, rule, id=f"{tool}-{path}")
    for tool in (Tool.SKYPILOT, Tool.DSTACK)
    for path, rule in leaves(TABLES[tool])
]


@pytest.mark.parametrize(("tool", "path", "rule"), FIELDS)
def test_each_documented_field_is_treated_as_the_table_says(tool, path, rule):
    path = path.replace("volumes.*", "volumes./KEY")
    document = merged(nested(path, rule.example), base(tool, path))
    if tool is Tool.SKYPILOT and path == "service.replica_policy.max_replicas":
        document["service"]["replica_policy"]["min_replicas"] = 1
    if path == "retry.duration":
        document["retry"]["on_events"] = ["no-capacity"]
    if path == "groups":
        document.pop("port")
    found = translated(tool, document)
    name = path.replace(ANY, "KEY")
    entry = entries(found)[name]
    assert isinstance(entry, compat.Refused) == (rule.treatment == "refused"), entry
    if isinstance(entry, compat.Refused):
        assert entry.reason
        assert entry.instead
        return
    assert entry.line > 0
    assert entry.becomes or entry.note, "nothing is said of it"
    assert bool(entry.becomes) == (rule.take is not None and bool(rule.becomes)) or rule.treatment == "mapped"
    assert [one for one in found.refused if not one.field.startswith(name)] == []
    read_by_us(found.spec)


@pytest.mark.parametrize("name", [name for name in sbatch.FIELDS if name.startswith("--")])
def test_each_option_of_sbatch_is_treated_as_the_table_says(name):
    rule = sbatch.FIELDS[name]
    beside = {
        "--deadline": "#SBATCH --time=1:00:00\n",
        "--constraint": "#SBATCH --gpus=1\n",
        "--ntasks-per-gpu": "#SBATCH --gpus=1\n",
    }
    beside |= {
        "--mem-per-gpu": "#SBATCH --gpus=1\n",
        "--cpus-per-gpu": "#SBATCH --gpus=1\n",
        "--signal": "#SBATCH --time=10\n",
    }
    option = f"{name}={rule.example}" if rule.example else name
    if " " in option:
        option = f'{name}="{rule.example}"'
    found = translated(Tool.SLURM, f"#!/bin/bash\n{beside.get(name, '')}#SBATCH {option}\ntrue\n")
    entry = entries(found)[name]
    assert isinstance(entry, compat.Refused) == (rule.treatment == "refused"), entry
    if isinstance(entry, compat.Refused):
        assert entry.reason
        assert entry.instead
        return
    assert entry.line == (3 if name in beside else 2)
    assert entry.becomes or entry.note
    assert found.refused == ()
    read_by_us(found.spec)


@pytest.mark.parametrize(
    ("tool", "document", "field", "hint"),
    [
        (Tool.SKYPILOT, {"run": "x", "num_node": 2}, "num_node", "Did you mean num_nodes?"),
        (Tool.SKYPILOT, {"run": "x", "resources": {"acelerators": "H100"}}, "resources.acelerators", "Did you mean resources.accelerators?"),
        (Tool.DSTACK, {"type": "task", "commands": ["x"], "enviroment": {}}, "enviroment", "Take it out."),
        (Tool.DSTACK, {"type": "task", "commands": ["x"], "resources": {"gpu": {"nam": "A100"}}}, "resources.gpu.nam", "Did you mean resources.gpu.name?"),
        (Tool.SLURM, "#!/bin/sh\n#SBATCH --gpu-per-node=1\nx\n", "--gpu-per-node", "Did you mean --gpus-per-node?"),
        (Tool.SLURM, "#!/bin/sh\n#SBATCH train.sh\nx\n", "train.sh", "Take it out."),
    ],
)  # fmt: skip
def test_a_field_that_nobody_documents_is_refused(tool, document, field, hint):
    refused = entries(translated(tool, document))[field]
    assert isinstance(refused, compat.Refused)
    assert (refused.instead, refused.line > 0) == (hint, True)


# --- any of them together ---


def leaf_paths(value: Any, path: str = "") -> Iterator[str]:
    """Every field of a document that has no fields in it, by its whole name."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaf_paths(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for index, inner in enumerate(value):
            yield from leaf_paths(inner, f"{path}[{index}]")
    elif path:
        yield path


def untold(document: Any, told: Mapping[str, Any]) -> list[str]:
    """The fields of a document that have no entry, and are in nothing that was told of as a whole."""

    def is_told(path: str) -> bool:
        while path:
            if path in told:
                return True
            path = path[:-1].rpartition("[")[0] if path.endswith("]") else path[: max(path.rfind("."), 0)]
        return False

    return [path for path in leaf_paths(document) if not is_told(path)]


VALUES = st.sampled_from([None, True, False, 0, -1, 7, 2.5, "", "7", "4+", "1..3", "16GB", "A100:2", [], ["x"], [1], {}, {"x": 1}, [{"y": 2}]])  # fmt: skip


@st.composite
def documents(draw, tool: Tool) -> dict[str, Any]:
    """A file with some of the documented fields, with documented values or others."""
    chosen = draw(st.lists(st.sampled_from(list(leaves(TABLES[tool]))), max_size=12))
    document: dict[str, Any] = {}
    for path, rule in chosen:
        value = draw(VALUES) if draw(st.integers(0, 3)) == 0 else rule.example
        document = merged(document, nested(path, value))
    if draw(st.booleans()):
        document["resources"] = merged(
            document.get("resources", {}) if isinstance(document.get("resources"), dict) else {},
            {"any_of": [{"accelerators": "L4:1", "use_spot": True}, {"infra": "aws", "labels": {"a": "b"}}]},
        )
    if tool is Tool.DSTACK:
        document.setdefault("type", draw(st.sampled_from(["task", "service", "dev-environment", "fleet"])))
    return document


@st.composite
def scripts(draw) -> tuple[str, list[str]]:
    """A script with some options, written in one way or another, and their long names."""
    names = draw(
        st.lists(st.sampled_from([name for name in sbatch.FIELDS if name.startswith("--")]), unique=True, max_size=12)
    )
    short = {f"--{name}": letter for letter, name in sbatch.SHORT.items()}
    lines, line = ["#!/bin/bash"], "#SBATCH"
    for name in names:
        value = str(sbatch.FIELDS[name].example)
        if value and draw(st.integers(0, 4)) == 0:
            value = draw(st.sampled_from(["0", "-1", "x", "1,2", "@", "99999999999"]))
        quoted = f"'{value}'"
        takes = sbatch.takes_value(name)
        if name in short and takes and draw(st.booleans()):
            line += f" -{short[name]}" + draw(st.sampled_from(["", " "])) + quoted
        elif takes:
            line += f" {name}" + (draw(st.sampled_from(["=", " "])) if sbatch.needs_value(name) else "=") + quoted
        else:
            line += f" {name}"
        if draw(st.booleans()):
            lines.append(line + draw(st.sampled_from(["", "  # why"])))
            line = "#SBATCH"
    lines.append(line)
    body = draw(
        st.sampled_from(["true", "srun ./a.out", "srun -n 2 a\nsrun b", "export A=1\nsrun --pty x", "mpirun x"])
    )
    return "\n".join([*lines, "", body, ""]), names


@pytest.mark.parametrize("tool", [Tool.SKYPILOT, Tool.DSTACK])
def test_no_field_of_a_file_is_dropped_in_silence(tool):
    @settings(max_examples=400, deadline=None)
    @given(documents(tool))
    def check(document):
        found = translated(tool, document)
        assert untold(document, entries(found)) == []
        for one in found.refused:
            assert one.reason, one
        assert all(one.reason for one in found.checked().refused)

    check()


@settings(max_examples=400, deadline=None)
@given(scripts())
def test_no_option_of_a_script_is_dropped_in_silence(script):
    text, names = script
    found = translated(Tool.SLURM, text)
    assert [name for name in names if name not in entries(found)] == []
    assert all(one.reason for one in found.checked().refused)
    srun = [one for one in entries(found) if one.startswith("srun")]
    assert len(srun) == text.count("\nsrun")


def test_a_reader_that_drops_a_field_would_be_found(monkeypatch):
    whole = mapping.walk

    def forgetful(draft: Any, rules: Mapping[str, Rule], given_: Mapping[str, Any], prefix: str = "") -> None:
        whole(draft, rules, {key: value for key, value in given_.items() if key != "disk_tier"}, prefix)

    monkeypatch.setattr(mapping, "walk", forgetful)
    monkeypatch.setattr(compat.reading.skypilot, "walk", forgetful)

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(documents(Tool.SKYPILOT))
    def check(document):
        assert untold(document, entries(translated(Tool.SKYPILOT, document))) == []

    with pytest.raises(AssertionError, match=r"disk_tier"):
        check()


def test_a_reader_that_drops_an_option_would_be_found(monkeypatch):
    whole = sbatch._parsed
    monkeypatch.setattr(
        sbatch, "_parsed", lambda line: ((name, value) for name, value in whole(line) if name != "--hint")
    )

    @settings(max_examples=400, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
    @given(scripts())
    def check(script):
        text, names = script
        assert [name for name in names if name not in entries(translated(Tool.SLURM, text))] == []

    with pytest.raises(AssertionError, match="--hint"):
        check()


def test_what_is_not_refused_can_be_run():
    """Documents of fields that are mapped become specs that the control plane accepts."""
    seed = random.Random(7)
    good = 0
    for tool in (Tool.SKYPILOT, Tool.DSTACK):
        rules = [
            (path, rule)
            for path, rule in leaves(TABLES[tool])
            if rule.treatment != "refused" and path.split(".")[0] not in (*DEV, "type")
        ]
        for _ in range(400):
            document: dict[str, Any] = base(tool, "")
            for path, rule in seed.sample(rules, 5):
                document = merged(document, nested(path, rule.example))
            found = translated(tool, document)
            if not found.refused and not {"image", "env"} <= found.spec.keys():
                read_by_us(found.spec)
                good += 1
    assert good > 200


# --- what is hidden ---


def test_values_of_secrets_are_not_shown():
    found = translated(Tool.SKYPILOT, {"run": "x", "secrets": {"TOKEN": "hunter2"}, "envs": {"A": "1"}})
    told = str(entries(found))
    assert "hunter2" not in told
    assert "tidemill secret set TOKEN" in told
    found = translated(
        Tool.DSTACK, {"type": "task", "commands": ["x"], "registry_auth": {"username": "me", "password": "hunter2"}}
    )
    assert "hunter2" not in str(entries(found))
