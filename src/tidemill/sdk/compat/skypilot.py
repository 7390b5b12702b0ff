"""SkyPilot task files: what becomes of each field.

Source: SkyPilot's YAML reference and service reference, versions 0.9 to 0.14.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from tidemill.sdk.compat.mapping import (
    ANY,
    AS_BASH,
    Draft,
    Refuse,
    Rule,
    Said,
    flag,
    gpu_request,
    label,
    maps,
    name_text,
    noted,
    number,
    own_python,
    place,
    port_number,
    refused,
    section,
    shown,
    size_text,
    text,
    volume,
    walk,
)

_MOST_PORTS: Final = 100
_RECOVERIES: Final = 1_000
_PROBE_WAIT_S: Final = 1_200
_DOWNSCALE_S: Final = 1_200
_STRATEGIES: Final = ("FAILOVER", "EAGER_NEXT_REGION", "EAGER_FAILOVER")
_SECRET: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_AT_LEAST: Final = re.compile(r"(\d+(?:\.\d+)?)\+?")
_TPU: Final = "Only TPUs have it, and there is no engine for them."
_INTERNAL: Final = "SkyPilot writes it into files of its own."
_LEAVE_OUT: Final = "Take it out."
_IN_WORKDIR: Final = (
    "Put small files into workdir; keep data as an artifact and name it in inputs, found in $TIDEMILL_INPUT_DIR/NAME;"
    " write checkpoints to $TIDEMILL_CHECKPOINT_DIR."
)


_AS_DATA: Final = (
    "Give it a name once (tidemill dataset add NAME FOLDER_OR_S3URL), and write data: [{dataset: NAME, at: PATH}]; put"
    " small files into workdir."
)


def read(draft: Draft, given: Mapping[str, Any]) -> None:
    """Fill the draft from a task file's mapping."""
    resources = given.get("resources")
    if isinstance(resources, Mapping):
        # candidates go over what stands beside them, wherever it stands
        later = {name: value for name, value in resources.items() if name in ("any_of", "ordered")}
        given = {**given, "resources": {**{name: resources[name] for name in resources if name not in later}, **later}}
    walk(draft, FIELDS, given)
    _finish(draft)


def _finish(draft: Draft) -> None:
    spec, given = draft.spec, draft.given
    section_ = given.get("resources")
    resources: Mapping[str, Any] = section_ if isinstance(section_, Mapping) else {}
    if "run" not in spec and "service" not in given:
        spec["kind"] = "dev"
        draft.default("run", "kind: dev", "A cluster without a program: a worker to attach to.")
    if not {"cpus", "instance_type"} & resources.keys():
        note = "SkyPilot takes a machine of 8 cores, or as many as come with the GPU."
        draft.default("resources.cpus", "resources.cpus: 1", note)
    if not {"job_recovery", "spot_recovery"} & resources.keys() and "service" not in given:
        retry = "retry: {on: [node_lost, preempted], max: 3}"
        draft.default("resources.job_recovery", retry, "Ours when nothing is said.")
    if "service" in spec and "port" not in spec["service"] and spec.get("ports"):
        spec["service"]["port"] = spec["ports"][0]
    before = [AS_BASH, *own_python(draft)]
    for name in ("setup", "run"):
        if spec.get(name):
            # where SkyPilot puts the work folder
            link = ['ln -sfn "$PWD" "$HOME/sky_workdir"'] if "sky_workdir" in spec[name] else []
            spec[name] = "\n".join([*before, *link, spec[name]])


# --- top level ---


def _name(draft: Draft, name: str, value: Any) -> Said:
    said = name_text(value)
    return Said(draft.put(name, said.becomes), said.note)


def _workdir(draft: Draft, name: str, value: Any) -> str:
    if isinstance(value, dict):
        url = value.get("url", "URL")
        raise Refuse(
            "A work folder is a folder here, not a repository.",
            f"Clone it first and name the folder, or begin setup with: git clone {url} .",
        )
    return draft.put(name, text(value))


def _nodes(draft: Draft, name: str, value: Any) -> str:
    return draft.put("nodes", number(value, "a number of nodes", low=1, high=4_096))


def _script(draft: Draft, name: str, value: Any) -> str:
    if not text(value).strip():
        return ""
    draft.put(name, text(value))
    return name


def _variable(draft: Draft, name: str, value: Any) -> str:
    variable = name.removeprefix("envs.")
    if variable.startswith("SKYPILOT_DOCKER_") or variable == "SKYPILOT_RUNPOD_DOCKER_USERNAME":
        raise Refuse(
            "Images are fetched with what the machines know of registries.",
            "Log in to the registry once on each machine (podman login or docker login).",
        )
    if variable in draft.surroundings.given:
        return f"envs.{variable} from --env"
    if value is None or value == "":
        if variable in draft.surroundings.environ:
            raise Refuse("It has no value in the file.", f"Give it: --env {variable}, which takes the value from here.")
        raise Refuse("It has no value in the file.", f"Give it: --env {variable}=VALUE.")
    draft.spec.setdefault("envs", {})[variable] = value
    return f"envs.{variable}"


def _volume(draft: Draft, name: str, value: Any) -> str:
    return volume(draft, value, name.removeprefix("volumes."))


def _secret(draft: Draft, name: str, value: Any) -> str:
    variable = name.rpartition(".")[2]
    return _named_secret(draft, variable, is_empty=value in (None, ""))


def _named_secret(draft: Draft, variable: str, *, is_empty: bool) -> str:
    if not _SECRET.fullmatch(variable):
        raise Refuse(f"{shown(variable)} is not the name of a secret.", "Use letters, digits and _.")
    if not is_empty:
        raise Refuse(
            "Values of secrets stay out of files.",
            f"Keep it once with tidemill secret set {variable}, and leave the value empty here.",
        )
    known = draft.spec.setdefault("secrets", [])
    if variable not in known:
        known.append(variable)
    return f"secrets: [{variable}]"


def _secrets(draft: Draft, name: str, value: Any) -> str:
    if not isinstance(value, list):
        raise Refuse("It is not a list of names.", "Write a list of names, or NAME: null lines.")
    words = []
    for one in value:
        if not isinstance(one, str):
            raise Refuse(
                "A secret as a file at a path is not there.", "Name it only, and read the variable of its name."
            )
        words.append(_named_secret(draft, one, is_empty=True))
    return "; ".join(words)


# --- resources ---


def _accelerators(draft: Draft, name: str, value: Any) -> Said:
    choices, is_ordered = _gpu_choices(value)
    draft.put("resources.gpus", choices[0])
    rest = choices[1:]
    if not rest:
        return Said(f"resources.gpus: {choices[0]}")
    draft.put("resources.any_of", [*draft.get("resources.any_of", []), *({"gpus": one} for one in rest)])
    note = "" if is_ordered else "They are tried in this order; SkyPilot tries the cheapest first."
    return Said(f"resources.gpus: {choices[0]}; resources.any_of: {', '.join(rest)}", note)


def _gpu_choices(value: Any) -> tuple[list[str], bool]:
    """The requests that would do, and whether their order is meant."""
    if isinstance(value, str):
        stripped = value.strip()
        if stripped.startswith("{") and stripped.endswith("}"):
            return _gpu_choices({part.strip().strip("'\""): None for part in stripped[1:-1].split(",") if part.strip()})
        return [_gpu(stripped)], True
    if isinstance(value, dict) and value:
        return [_gpu(str(one), count) for one, count in value.items()], False
    if isinstance(value, list) and value:
        return [_gpu(text(one)) for one in value], True
    raise Refuse(f"{shown(value)} is not a request for accelerators.", "Write for example H100:8.")


def _gpu(wanted: str, count: Any = None) -> str:
    model, _, written = wanted.partition(":")
    return gpu_request(model, count if count is not None else written or 1)


def _cpus(draft: Draft, name: str, value: Any) -> Said:
    return Said(draft.put("resources.cpus", _cores(value)), _at_least(value, "cores"))


def _cores(value: Any) -> int | float:
    match = None if isinstance(value, bool) else _AT_LEAST.fullmatch(str(value).strip())
    if match is None or not float(match[1]):
        raise Refuse(f"{shown(value)} is not a number of CPUs.", "Write for example 4 or 4+.")
    cores = float(match[1])
    return int(cores) if cores.is_integer() else cores


def _memory(draft: Draft, name: str, value: Any) -> Said:
    return Said(draft.put("resources.memory", _bytes(value)), _at_least(value, "memory"))


def _bytes(value: Any) -> str:
    return size_text(str(value).removesuffix("+") if not isinstance(value, bool) else value)


def _at_least(value: Any, what: str) -> str:
    return f"So much {what} is held, and not more." if str(value).endswith("+") else ""


def _disk(draft: Draft, name: str, value: Any) -> str:
    return draft.put("resources.disk", size_text(value))


def _spot(draft: Draft, name: str, value: Any) -> str:
    return draft.put("capacity", "spot" if flag(value) else "on_demand")


def _infra(draft: Draft, name: str, value: Any) -> str:
    labels = _places(value)
    words = [place(draft, key, word) for key, word in labels.items()]
    return "; ".join(words) or "placement: anywhere"


def _places(value: Any) -> dict[str, str]:
    """The labels that stand for ``cloud/region/zone``; a wildcard asks for none."""
    cloud, _, rest = text(value).partition("/")
    parts = [cloud, rest] if cloud in ("k8s", "kubernetes", "ssh", "slurm") else [cloud, *rest.split("/", 1)]
    if any("*" in part and part != "*" for part in parts):
        raise Refuse(f"{shown(value)} has a pattern in it.", "Name the places with | between them: placement.labels.")
    names = ("cloud", "region", "zone")
    return {key: part for key, part in zip(names, parts, strict=False) if part and part != "*"}


def _cloud(draft: Draft, name: str, value: Any) -> str:
    return place(draft, name.rpartition(".")[2], text(value))


def _ports(draft: Draft, name: str, value: Any) -> str:
    ports: list[int] = []
    for one in value if isinstance(value, list) else [value]:
        first, dash, last = str(one).partition("-")
        low = port_number(first)
        high = port_number(last) if dash else low
        if not 0 <= high - low < _MOST_PORTS:
            raise Refuse(f"{shown(one)} is a long range.", f"Name at most {_MOST_PORTS} ports.")
        ports += range(low, high + 1)
    known = draft.spec.setdefault("ports", [])
    known += [port for port in ports if port not in known]
    return f"ports: {shown(ports)}"


def _image(draft: Draft, name: str, value: Any) -> str:
    if isinstance(value, str) and value.startswith("docker:"):
        return draft.put("image", value.removeprefix("docker:"))
    raise Refuse("It is an image of a cloud's machines.", "Name a container image: docker:IMAGE, or env for packages.")


def _label(draft: Draft, name: str, value: Any) -> str:
    return label(draft, name.split("labels.", 1)[1], value)


def _recovery(draft: Draft, name: str, value: Any) -> Said:
    if str(value).lower() == "none":
        draft.put("retry", {"max": 0})
        return Said("retry.max: 0")
    _strategy(draft, name, value)
    return Said(_retry(draft))


def _strategy(draft: Draft, name: str, value: Any) -> Said:
    if str(value).lower() == "none":
        draft.spec["retry"] = {"max": 0}
        return Said("retry.max: 0")
    if str(value).upper() not in _STRATEGIES:
        raise Refuse(
            f"{shown(value)} is not a strategy that is documented.", f"Leave it out, or write {_STRATEGIES[0]}."
        )
    return Said(_retry(draft), "Where it goes on is for the scheduler to say.")


def _restarts(draft: Draft, name: str, value: Any) -> Said:
    most = number(value, "a number of restarts", high=1_000)
    if most:
        _retry(draft, "error")
        draft.spec["retry"]["max"] = most
    return Said(
        f"retry.max: {most}" if most else _retry(draft),
        "Lost machines and having to give way count as well." if most else "",
    )


def _exit_codes(draft: Draft, name: str, value: Any) -> str:
    codes = [number(code, "an exit code", low=1, high=255) for code in (value if isinstance(value, list) else [value])]
    return _retry(draft, *(f"exit:{code}" for code in codes))


def _retry(draft: Draft, *causes: str) -> str:
    retry = draft.spec.setdefault("retry", {"on": ["node_lost", "preempted"], "max": _RECOVERIES})
    retry["on"] = [*retry.get("on", ()), *(cause for cause in causes if cause not in retry.get("on", ()))]
    draft.trace("retry")
    return f"retry.on: {shown(retry['on'])}"


def _priority(draft: Draft, name: str, value: Any) -> str:
    if type(value) is not int or not -1_000 <= value <= 1_000:
        raise Refuse(f"{shown(value)} is not a priority.", "Write -1000 to 1000.")
    return draft.put("priority", value)


def _tier_of_network(draft: Draft, name: str, value: Any) -> Said:
    if value == "best":
        return Said(
            draft.put("placement.prefer", "rack"), "The fabric is what the machines have; near ones are preferred."
        )
    return Said("")


# --- candidates ---


def _candidates(draft: Draft, name: str, value: Any) -> Said:
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise Refuse(f"{shown(value)} is not a list of resources.", "Write a list of sections.")
    if name.endswith("ordered") and "any_of" in draft.given["resources"]:
        raise Refuse("There are candidates in any_of beside it.", "Keep one of both.")
    if draft.get("resources.any_of"):
        raise Refuse("Several accelerators are named beside it.", "Name each of them as a candidate of its own.")
    drafts = []
    for index, one in enumerate(value):
        inner = draft.beside()
        walk(inner, _SINGLE, one, f"{name}[{index}].")
        drafts.append(inner)
    for inner in drafts:
        draft.mapped += inner.mapped
        draft.refused += inner.refused
    _choose(draft, [inner.spec for inner in drafts])
    note = "They are tried in this order; SkyPilot tries the cheapest first." if name.endswith("any_of") else ""
    return Said("resources.any_of", note)


def _choose(draft: Draft, specs: list[dict[str, Any]]) -> None:
    """Put what the candidates have in common, and their hardware as alternatives. Raises: Refuse."""
    hardware = [dict(spec.pop("resources", {})) for spec in specs]
    places = [dict(spec.pop("placement", {}).get("labels", {})) for spec in specs]
    if any(spec != specs[0] for spec in specs):
        differing = sorted({key for spec in specs for key in spec if spec.get(key) != specs[0].get(key)} | {"capacity"})
        raise Refuse(
            f"Candidates differ in {', '.join(differing[:1])}, which a workload has once.",
            "Submit a workload for each, or let them differ in accelerators, cpus, memory, disk_size and place only.",
        )
    if any(one != hardware[0] for one in hardware) and any(one != places[0] for one in places):
        raise Refuse(
            "Candidates differ in hardware and in place.",
            "Let them differ in one of both, or submit a workload for each.",
        )
    if len({tuple(sorted(one)) for one in places}) > 1:
        raise Refuse(
            "Some candidates name a narrower place than others.", "Name places of one kind: clouds, regions, or zones."
        )
    for key, one in specs[0].items():
        _combine(draft.spec, key, one)
    for key in places[0]:
        place(draft, key, "|".join(dict.fromkeys(one[key] for one in places)))
    flat = [choice for one in hardware for choice in _unfolded(one)]
    unique = [one for index, one in enumerate(flat) if one not in flat[:index]]
    usual = {**_NOTHING, **draft.get("resources", {})}
    first, rest = unique[0], unique[1:]
    # an alternative is told by what differs from the first, which may not be what stands beside the candidates
    others = [
        {key: value for key, value in {**usual, **one}.items() if value != {**usual, **first}[key]} for one in rest
    ]
    resources = {**draft.get("resources", {}), **first, **({"any_of": others} if others else {})}
    if resources:
        draft.spec["resources"] = resources


_NOTHING: Final = {"gpus": "none", "cpus": 1, "memory": "0GB", "disk": "0GB"}


def _combine(spec: dict[str, Any], key: str, value: Any) -> None:
    """Put what candidates have beside what is there: labels and ports are added, other things replaced."""
    known = spec.get(key)
    if isinstance(known, list) and isinstance(value, list):
        spec[key] = [*known, *(one for one in value if one not in known)]
    elif key == "labels" and isinstance(known, dict):
        spec[key] = {**known, **value}
    else:
        spec[key] = value


def _unfolded(hardware: dict[str, Any]) -> list[dict[str, Any]]:
    """A candidate whose accelerators are several, as several candidates."""
    others = hardware.pop("any_of", [])
    return [hardware, *({**hardware, **one} for one in others)]


# --- service ---


def _probe(draft: Draft, name: str, value: Any) -> Said:
    path = _probe_path(draft, name, value)
    draft.put("service.readiness.timeout", f"{_PROBE_WAIT_S}s")
    return Said(path, f"It may take {_PROBE_WAIT_S} s, as there.")


def _probe_path(draft: Draft, name: str, value: Any) -> str:
    if not text(value).startswith("/"):
        raise Refuse(f"{shown(value)} is not a path.", "Write for example /health.")
    draft.spec.setdefault("service", {}).setdefault("readiness", {}).setdefault("timeout", f"{_PROBE_WAIT_S}s")
    return draft.put("service.readiness.path", text(value))


def _probe_delay(draft: Draft, name: str, value: Any) -> str:
    return draft.put("service.readiness.timeout", f"{number(value, 'a number of seconds', low=1, high=10**7)}s")


def _replicas(draft: Draft, name: str, value: Any) -> str:
    return draft.put("service.replicas", number(value, "a number of replicas", low=1, high=64))


def _policy_replicas(draft: Draft, name: str, value: Any) -> Said:
    """The range that ``min_replicas`` and ``max_replicas`` are together; each says the same of it."""
    policy = draft.given["service"]["replica_policy"]
    number(value, "a number of replicas", low=0, high=64)
    least = number(policy.get("min_replicas", 1), "a number of replicas", low=0, high=64)
    most = number(policy.get("max_replicas") or least or 1, "a number of replicas", low=1, high=64)
    if least > most:
        raise Refuse("The most replicas are fewer than the least.", f"Write max_replicas: {least} or more.")
    if least == most:
        return Said(draft.put("service.replicas", least))
    if "downscale_delay_seconds" not in policy:
        draft.put("service.idle", f"{_DOWNSCALE_S}s")
    return Said(
        draft.put("service.replicas", f"{least}..{most}"), "The number follows the requests that are under way."
    )


def _downscale_delay(draft: Draft, name: str, value: Any) -> str:
    return draft.put("service.idle", f"{number(value, 'a number of seconds', low=0, high=86_400)}s")


def _service_port(draft: Draft, name: str, value: Any) -> str:
    port = port_number(value)
    known = draft.spec.setdefault("ports", [])
    if port not in known:
        known.append(port)
    return draft.put("service.port", port)


_SINGLE: Final[dict[str, Rule]] = {
    "infra": maps(
        "placement.labels.{cloud,region,zone}",
        _infra,
        example="aws/us-east-1",
        note="Machines need to have these labels; quote tells when none has.",
    ),
    "cloud": maps("placement.labels.cloud", _cloud, example="aws"),
    "region": maps("placement.labels.region", _cloud, example="us-east-1"),
    "zone": maps("placement.labels.zone", _cloud, example="us-east-1a"),
    "accelerators": maps("resources.gpus, resources.any_of", _accelerators, example="H100:8"),
    "accelerator_args": section(
        {
            "runtime_version": refused(_TPU, _LEAVE_OUT, example="tpu-vm-base"),
            "tpu_name": refused(_TPU, _LEAVE_OUT, example="mytpu"),
            "tpu_vm": refused(_TPU, _LEAVE_OUT, example=True),
            "gcp_queued_resource": refused(_TPU, _LEAVE_OUT, example=True),
        }
    ),
    "cpus": maps("resources.cpus", _cpus, example="4+"),
    "memory": maps("resources.memory", _memory, example="32+", note="So much is held; more is not had."),
    "instance_type": refused(
        "It names a machine of one cloud.",
        "Say what is needed of it: resources.gpus, cpus, memory.",
        example="p4d.24xlarge",
    ),
    "use_spot": maps("capacity: spot", _spot, example=True),
    "spot_recovery": maps("retry", _recovery, example="FAILOVER"),
    "job_recovery": maps(
        "retry",
        _recovery,
        example="FAILOVER",
        below={
            "strategy": maps("retry", _strategy, example="FAILOVER"),
            "max_restarts_on_errors": maps("retry.max, retry.on: error", _restarts, example=3),
            "recover_on_exit_codes": maps("retry.on: exit:CODE", _exit_codes, example=[33]),
        },
    ),
    "disk_size": maps("resources.disk", _disk, example=256),
    "ephemeral_storage": maps("resources.disk", _disk, example=256),
    "disk_tier": noted("Disks are those of the machine; only speed could differ.", example="medium"),
    "network_tier": maps("placement.prefer: rack", _tier_of_network, example="best"),
    "local_disk": refused(
        "Local disks are not asked for by kind.",
        "Ask for space: resources.disk, found in $TIDEMILL_SCRATCH_DIR.",
        example="nvme:300+",
    ),
    "max_hourly_cost": refused(
        "A workload has no ceiling on its price.", "See the price before: tidemill quote FILE.", example=10.0
    ),
    "ports": maps(
        "ports", _ports, example=8081, note="They are open on the machine; a service is reached through the gateway."
    ),
    "image_id": maps("image", _image, example="docker:ubuntu:22.04"),
    "labels": section({ANY: maps("labels", _label, example="my-value")}),
    "autostop": Rule(
        note="A machine is never kept for a job; what it held is free when run ends.",
        example=10,
        below={
            "idle_minutes": noted("What a job held is free when run ends.", example=10),
            "down": noted("What a job held is free when run ends.", example=True),
            "wait_for": noted("What a job held is free when run ends.", example="none"),
            "hook": refused("Nothing runs after run.", "Put its commands at the end of run.", example="echo bye"),
            "hook_timeout": refused(
                "Nothing runs after run.", "Put the hook's commands at the end of run.", example=300
            ),
        },
    ),
    "priority": maps("priority", _priority, example=500),
    "priority_class": refused("Classes are Kubernetes' own.", "Write priority: -1000 to 1000.", example="high"),
    "volumes": refused("Disks of clouds are not attached.", _IN_WORKDIR, example=[{"name": "v", "path": "/mnt"}]),
    "_docker_login_config": refused(_INTERNAL, _LEAVE_OUT, example={}, is_hidden=True),
    "_is_image_managed": refused(_INTERNAL, _LEAVE_OUT, example=True),
    "_requires_fuse": refused(_INTERNAL, _LEAVE_OUT, example=True),
    "_cluster_config_overrides": refused(_INTERNAL, _LEAVE_OUT, example={}),
    "_no_missing_accel_warnings": refused(_INTERNAL, _LEAVE_OUT, example=True),
}

_MOUNT: Final = "Folders and buckets are not mounted by their addresses."

FIELDS: Final[dict[str, Rule]] = {
    "name": maps("name", _name, example="my-task"),
    "workdir": maps(
        "workdir",
        _workdir,
        example=".",
        note="It counts from where tidemill is called, and is a copy: keep results in $TIDEMILL_OUTPUT_DIR.",
    ),
    "num_nodes": maps(
        "nodes", _nodes, example=2, note="Workers may share a machine; placement.spread: host forbids it."
    ),
    "resources": section(
        {
            **_SINGLE,
            "any_of": maps(
                "resources.any_of, placement.labels",
                _candidates,
                example=[{"accelerators": "L4:1"}, {"accelerators": "A100:1"}],
            ),
            "ordered": maps(
                "resources.any_of, placement.labels",
                _candidates,
                example=[{"infra": "aws/us-east-1"}, {"infra": "aws/us-west-2"}],
            ),
        }
    ),
    "envs": section({ANY: maps("envs", _variable, example="13b", takes_null=True)}),
    "secrets": Rule(
        becomes="secrets",
        take=_secrets,
        example=["HF_TOKEN"],
        is_hidden=True,
        below={
            ANY: Rule(becomes="secrets", take=_secret, takes_null=True, is_hidden=True),
        },
    ),
    "managed_secrets": maps("secrets", _secrets, example=["HF_TOKEN"]),
    "volumes": section(
        {ANY: maps("volumes", _volume, example="my-volume", note="A volume of that name: tidemill volume create.")}
    ),
    "file_mounts": section({ANY: refused(_MOUNT, _AS_DATA, example="s3://my-bucket")}),
    "setup": maps(
        "setup",
        _script,
        example="pip install -r requirements.txt",
        note="It runs on each attempt, before run, in every worker.",
    ),
    "run": maps("run", _script, example="python train.py"),
    "config": section(
        {
            ANY: refused(
                "It sets up clouds and Kubernetes for SkyPilot.",
                "Settings of this cloud are in config.yaml.",
                example={"provision_timeout": 600},
            )
        }
    ),
    "event_callback": refused("No program is called on events.", "Follow GET /v1/events.", example="echo $JOB_STATUS"),
    "service": section(
        {
            "readiness_probe": maps(
                "service.readiness.path",
                _probe,
                example="/health",
                below={
                    "path": maps("service.readiness.path", _probe_path, example="/health"),
                    "initial_delay_seconds": maps("service.readiness.timeout", _probe_delay, example=1200),
                    "timeout_seconds": noted("A probe waits 2 s for its answer, and is repeated.", example=15),
                    "endpoint_probe_interval_seconds": noted("Probes are repeated all the time.", example=10),
                    "consecutive_failure_threshold_timeout": noted(
                        "A replica that fails its probe gets no requests until it passes.", example=180
                    ),
                    "post_data": refused(
                        "Probes are GET requests.",
                        "Give a path that answers GET with 200, such as /health.",
                        example={"model": "m"},
                    ),
                    "headers": refused(
                        "Probes have no headers of their own.",
                        "Give a path that answers without them.",
                        example={"X": "y"},
                    ),
                },
            ),
            "replicas": maps("service.replicas", _replicas, example=2),
            "replica_policy": section(
                {
                    "min_replicas": maps("service.replicas", _policy_replicas, example=1),
                    "max_replicas": maps(
                        "service.replicas",
                        _policy_replicas,
                        example=3,
                        limits="service.idle is 20 minutes, as there, unless downscale_delay_seconds is given.",
                    ),
                    "num_overprovision": refused(
                        "No more replicas are kept than requests need.", "Raise min_replicas by as many.", example=1
                    ),
                    "target_qps_per_replica": refused(
                        "The number of replicas follows the requests that are under way, not how many come a second.",
                        "Take it out; in a Tidemill spec, service.concurrency says how many a replica takes at a time.",
                        example=2.5,
                    ),
                    "upscale_delay_seconds": refused(
                        "Replicas are added as soon as requests need them.", "Take it out.", example=300
                    ),
                    "downscale_delay_seconds": maps(
                        "service.idle", _downscale_delay, example=1200, limits="Up to a day."
                    ),
                    "dynamic_ondemand_fallback": refused(
                        "Replicas are of one capacity.", "Write use_spot: false.", example=True
                    ),
                    "base_ondemand_fallback_replicas": refused(
                        "Replicas are of one capacity.", "Write use_spot: false.", example=1
                    ),
                    "spot_placer": refused(
                        "Where replicas are put is for the scheduler to say.",
                        "Leave it out.",
                        example="dynamic_fallback",
                    ),
                }
            ),
            "ports": maps("service.port", _service_port, example=8080),
            "load_balancing_policy": noted(
                "The gateway sends a request to the replica with the fewest.", example="least_load"
            ),
            "load_balancer": section(
                {"stream_timeout_seconds": noted("The gateway has time limits of its own.", example=120)}
            ),
            "tls": section(
                {
                    "keyfile": refused(
                        "The gateway does not end TLS.",
                        "Put a proxy with the certificate before it.",
                        example="key.pem",
                    ),
                    "certfile": refused(
                        "The gateway does not end TLS.",
                        "Put a proxy with the certificate before it.",
                        example="cert.pem",
                    ),
                }
            ),
            "pool": refused(
                "There are no pools of workers.",
                "Submit an array, or jobs: they share the machines.",
                example={"workers": 2},
            ),
            "workers": refused(
                "There are no pools of workers.", "Submit an array, or jobs: they share the machines.", example=2
            ),
        }
    ),
    "pool": refused(
        "There are no pools of workers.", "Submit an array, or jobs: they share the machines.", example={"workers": 2}
    ),
    "inputs": noted("SkyPilot estimates transfer costs with it.", example={"s3://my-bucket": 10}),
    "outputs": noted("SkyPilot estimates transfer costs with it.", example={"s3://my-bucket": 10}),
    "file_mounts_mapping": refused(_INTERNAL, _LEAVE_OUT, example={}),
    "volume_mounts": refused(_INTERNAL, _LEAVE_OUT, example=[]),
    "api_server_access": refused(
        "Jobs reach the control plane by $TIDEMILL_API_URL and $TIDEMILL_TOKEN.", _LEAVE_OUT, example=True
    ),
    "_metadata": refused(_INTERNAL, _LEAVE_OUT, example={}),
}
