"""dstack configurations of type task, dev-environment and service: what becomes of each field.

Source: dstack's reference of .dstack.yml files, versions 0.19 to 0.22.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath
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
from tidemill.units import parse_size

_KINDS: Final = {"task": "task", "dev-environment": "dev", "service": "service"}
_OF: Final = {
    **dict.fromkeys(("nodes",), ("task",)),
    **dict.fromkeys(("ide", "version", "init", "inactivity_duration"), ("dev-environment",)),
    **dict.fromkeys(("commands", "groups"), ("task", "service")),
    **dict.fromkeys(("ports",), ("task", "dev-environment")),
    **dict.fromkeys(
        ("port", "gateway", "strip_prefix", "model", "https", "auth", "scaling", "rate_limits", "replicas", "probes"),
        ("service",),
    ),
}
"""Fields that are not those of all types."""
_SECRET: Final = re.compile(r"\$\{\{\s*secrets\.([A-Za-z_][A-Za-z0-9_]*)\s*\}\}")
_EXPRESSION: Final = re.compile(r"\$\{\{")
_NAME: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_DURATION: Final = re.compile(r"(\d+)\s*([smhdw]?)")
_VENDORS: Final = ("nvidia", "amd", "google", "tpu", "intel", "tenstorrent", "tt")
_LEAVE_OUT: Final = "Take it out."
_OWN_MACHINES: Final = "A machine is never made or kept for a job."


def read(draft: Draft, given: Mapping[str, Any]) -> None:
    """Fill the draft from a configuration's mapping."""
    kind = given.get("type", "")
    if not isinstance(kind, str) or kind not in _KINDS:
        draft.refuse(
            "type",
            kind,
            "Only task, dev-environment and service are workloads.",
            "Machines are named in config.yaml, not here.",
        )
        given = {name: value for name, value in given.items() if name != "type"}
    elsewhere = [name for name in given if "type" in given and name in _OF and kind not in _OF[name]]
    for name in elsewhere:
        owners = " or ".join(f"type: {one}" for one in _OF[name])
        draft.refuse(name, given[name], f"dstack has it not with type: {kind}.", f"Write {owners}, or take it out.")
    walk(draft, FIELDS, {name: value for name, value in given.items() if name not in elsewhere})
    _finish(draft, given)


def _finish(draft: Draft, given: Mapping[str, Any]) -> None:
    spec = draft.spec
    resources = given.get("resources") if isinstance(given.get("resources"), dict) else {}
    if "cpu" not in (resources or {}):
        draft.default("resources.cpu", draft.put("resources.cpus", 2), "As there.")
    if "memory" not in (resources or {}):
        draft.default("resources.memory", "resources.memory: 0", "Memory is not limited; there it is at least 8 GB.")
    if "retry" not in given:
        draft.default("retry", draft.put("retry", {"max": 0}), "As there: what is lost is not run again.")
    if "stop_duration" not in given:
        draft.default("stop_duration", draft.put("checkpoint.grace", "5m"), "As there.")
    if not ({"image", "python"} & given.keys()):
        draft.default(
            "image", "env: none", "The machine's own Python; there it is an image of dstack with Python and CUDA."
        )
    if given.get("type") == "service" and "port" in spec.get("service", {}):
        _finish_service(draft, given)
    before = [AS_BASH, 'export DSTACK_WORKING_DIR="$PWD" DSTACK_REPO_DIR="$PWD"', *own_python(draft), *draft.before_run]
    for name in ("run", "setup"):
        if spec.get(name):
            spec[name] = "\n".join([*before, spec[name]])


def _finish_service(draft: Draft, given: Mapping[str, Any]) -> None:
    if "probes" not in given and draft.spec["service"].get("model"):
        draft.default("probes", "service.readiness: an open port", "There a model is asked for a completion.")


# --- values ---


def _commands_of(value: Any) -> str:
    """The commands as one script, which ends at the first that fails."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(one, str) for one in value):
        raise Refuse(f"{shown(value)} is not a list of commands.", "Write a list of shell commands.")
    if any("DSTACK_MPI_HOSTFILE" in one for one in value):
        raise Refuse(
            "There is no host file for MPI: workers do not log in to each other.",
            "Start one process in each worker, by DSTACK_NODE_RANK or torchrun.",
        )
    if any(_EXPRESSION.search(one) for one in value):
        raise Refuse("It has ${{ … }} in it.", "Name the secret in env, and use the variable.")
    if len(value) == 1:
        return str(value[0])
    return "\n".join(f"{{\n{one.rstrip()}\n}} || exit $?" for one in value)


def _duration(value: Any) -> str:
    """A duration as Tidemill writes it. Raises: Refuse."""
    match = None if isinstance(value, bool) else _DURATION.fullmatch(str(value).strip())
    if match is None:
        raise Refuse(f"{shown(value)} is not a duration.", "Write for example 90s, 15m, 2h or 1d.")
    return f"{match[1]}{match[2] or 's'}"


def _range(value: Any) -> tuple[str, str]:
    """The least and the most of a value such as ``4``, ``2..8``, ``16GB..`` or ``{min: 2, max: 8}``."""
    if isinstance(value, dict) and value and value.keys() <= {"min", "max"}:
        return str(value.get("min") or ""), str(value.get("max") or "")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise Refuse(f"{shown(value)} is neither a value nor a range.", "Write for example 4, 2..8 or 4...")
    low, dots, high = str(value).replace(" ", "").partition("..")
    return (low, high) if dots else (low, low)


def _least(value: Any, what: str) -> tuple[str, str]:
    """The least of a range, and what is to be said of the rest."""
    low, high = _range(value)
    if not low:
        raise Refuse(f"{shown(value)} has no least value.", "Write the least that is needed, such as 4...")
    return low, "" if low == high else f"The least {what} of the range is held, and not more."


# --- what runs ---


def _type(draft: Draft, name: str, value: Any) -> str:
    return draft.put("kind", _KINDS[value])


def _name(draft: Draft, name: str, value: Any) -> Said:
    said = name_text(value)
    return Said(draft.put("name", said.becomes), said.note)


def _commands(draft: Draft, name: str, value: Any) -> str:
    draft.put("run", _commands_of(value))
    return "run"


def _init(draft: Draft, name: str, value: Any) -> str:
    draft.put("setup", _commands_of(value))
    return "setup"


def _image(draft: Draft, name: str, value: Any) -> str:
    return draft.put("image", text(value).removeprefix("docker:"))


def _python(draft: Draft, name: str, value: Any) -> str:
    return draft.put("env.python", text(value))


def _working_dir(draft: Draft, name: str, value: Any) -> str:
    folder = PurePosixPath(text(value))
    if ".." in folder.parts:
        raise Refuse("It leads out of the work folder.", "Name a folder below the work folder.")
    if folder.is_absolute() and "image" not in draft.given:
        raise Refuse("A path of an image, without an image.", "Write it relative to the work folder.")
    if str(folder) != ".":
        draft.before_run.append(f"mkdir -p {_quoted(str(folder))}; cd {_quoted(str(folder))} || exit")
    return f"run: cd {folder}"


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\\''") + "'"


def _shell(draft: Draft, name: str, value: Any) -> Said:
    if text(value).rpartition("/")[2] in ("bash", "sh"):
        return Said("", "Scripts are run by bash, or by sh where there is no bash.")
    raise Refuse(f"Scripts are run by bash, not by {value}.", f"Write commands such as {value} -c '…'.")


def _only_without(what: str, instead: str, *accepted: Any) -> Any:
    """A rule for a field that only has an equivalent when it asks for nothing."""

    def take(draft: Draft, name: str, value: Any) -> Said:
        if any(type(value) is type(one) and value == one for one in accepted):
            return Said("", "As it is here.")
        raise Refuse(what, instead)

    return take


def _env(draft: Draft, name: str, value: Any) -> Said:
    if not isinstance(value, list):
        raise Refuse(f"{shown(value)} is not a list of variables.", "Write a list of NAME=value, or NAME: value lines.")
    words = []
    for one in value:
        variable, equals, setting = text(one).partition("=")
        words.append(_variable(draft, variable, setting if equals else None))
    return Said("; ".join(words))


def _env_item(draft: Draft, name: str, value: Any) -> str:
    return _variable(draft, name.removeprefix("env."), value)


def _variable(draft: Draft, variable: str, value: Any) -> str:
    around = draft.surroundings
    if not _NAME.fullmatch(variable):
        raise Refuse(f"{shown(variable)} is not the name of a variable.", "Use letters, digits and _.")
    if variable in around.given:
        return f"envs.{variable} from --env"
    if value is None:
        if variable not in around.environ:
            raise Refuse(f"{variable} has no value in the file, and none here.", f"Give it: --env {variable}=VALUE.")
        draft.spec.setdefault("envs", {})[variable] = around.environ[variable]
        return f"envs.{variable} from here"
    if match := _SECRET.fullmatch(str(value).strip()):
        secrets = draft.spec.setdefault("secrets", [])
        if match[1] not in secrets:
            secrets.append(match[1])
        if match[1] != variable:
            draft.before_run.append(f'export {variable}="${match[1]}"')
        return f"secrets: [{match[1]}]"
    if _EXPRESSION.search(str(value)):
        raise Refuse(
            f"{variable} has ${{{{ … }}}} within other text.",
            "Name the secret alone, and put the text together in commands.",
        )
    draft.spec.setdefault("envs", {})[variable] = text(value)
    return f"envs.{variable}"


def _files(draft: Draft, name: str, value: Any) -> Said:
    if not isinstance(value, list):
        raise Refuse(f"{shown(value)} is not a list.", "Write a list of paths.")
    for one in value:
        if isinstance(one, dict):
            local, remote = text(one.get("local_path", "")), text(one.get("path", ""))
        else:
            local, colon, remote = text(one).partition(":")
            remote = remote if colon else local
        if _below(local) is None or _below(local) != _below(remote):
            raise Refuse(
                f"{shown(one)} goes from one path to another.",
                "Keep the files below the folder of this file, and use them at the same path.",
            )
    draft.put("workdir", ".")
    return Said("workdir: .", "All of this file's folder is taken along; .tidemillignore leaves things out.")


def _below(path: str) -> str | None:
    """A path below a folder, in its shortest form; None when it leads elsewhere."""
    pure = PurePosixPath(path)
    return None if not path or pure.is_absolute() or path.startswith("~") or ".." in pure.parts else str(pure)


def _repos(draft: Draft, name: str, value: Any) -> Said:
    items = value if isinstance(value, list) else [value]
    if len(items) != 1:
        raise Refuse("There is one work folder.", "Clone the others in commands: git clone URL.")
    one = items[0]
    given = dict(one) if isinstance(one, dict) else {}
    local = text(given.get("local_path", "")) if given else text(one).partition(":")[0]
    if (
        given.keys() - {"local_path", "path", "if_exists"}
        or not local
        or "://" in text(one if not given else local)
        or "@" in local
    ):
        raise Refuse(
            "A repository is not cloned for a job.", "Clone it in commands: git clone URL, or name a local folder."
        )
    remote = given.get("path") if given else (text(one).partition(":")[2] or None)
    if remote is not None and _below(str(remote)) != ".":
        raise Refuse("The work folder is where the worker starts.", "Leave the path out, and use working_dir or cd.")
    draft.put("workdir", local)
    return Said(f"workdir: {local}", "As the folder is, with what is not committed; what .gitignore names is left out.")


# --- resources ---


def _cpu(draft: Draft, name: str, value: Any) -> Said:
    if isinstance(value, dict) and not value.keys() <= {"min", "max"}:
        raise Refuse(f"{shown(value)} is not a number of cores.", "Write for example 4, or {arch: x86, count: 4}.")
    if isinstance(value, str) and ":" in value:
        arch, _, value = value.partition(":")
        _arch(draft, name, arch)
    return _cores(draft, name, value)


def _arch(draft: Draft, name: str, value: Any) -> str:
    if str(value).lower() not in ("x86", "arm"):
        raise Refuse(f"{shown(value)} is not an architecture.", "Write x86 or arm.")
    return place(draft, "arch", str(value).lower())


def _cores(draft: Draft, name: str, value: Any) -> Said:
    low, note = _least(value, "number of cores")
    return Said(draft.put("resources.cpus", number(low, "a number of cores", low=1, high=10**6)), note)


def _memory(draft: Draft, name: str, value: Any) -> Said:
    low, note = _least(value, "memory")
    return Said(draft.put("resources.memory", size_text(low)), note)


def _disk(draft: Draft, name: str, value: Any) -> Said:
    low, note = _least(value, "space")
    return Said(draft.put("resources.disk", size_text(low)), note)


def _shared_memory(draft: Draft, name: str, value: Any) -> Said:
    wanted = parse_size(size_text(value))
    if "image" not in draft.given:
        return Said("", "Without an image, shared memory is the machine's own.")
    memory = draft.given["resources"].get("memory")
    held = parse_size(size_text(_least(memory, "memory")[0])) if memory is not None else 1 << 30
    if wanted > held:
        raise Refuse(
            "Shared memory in an image is as large as resources.memory, or 1 GB without that.",
            f"Ask for memory: {size_text(value)} or more.",
        )
    return Said("image: its shared memory", "As large as resources.memory, or 1 GB.")


def _gpu(draft: Draft, name: str, value: Any) -> Said:
    if isinstance(value, dict):
        raise Refuse(f"{shown(value)} is not a request for GPUs.", "Write for example A100:80GB:2.")
    parts: dict[str, Any] = {}
    for token in text(value).replace(" ", "").split(":"):
        if token.lower() in _VENDORS:
            kind = "vendor"
        elif token[:1].isalpha():
            kind = "name"
        else:
            kind = "memory" if any(letter.isalpha() for letter in token) else "count"
        if not token or kind in parts:
            raise Refuse(f"{shown(value)} is not a request for GPUs.", "Write for example A100:80GB:2.")
        parts[kind] = token.split(",") if kind == "name" else token
    return _gpus(draft, parts)


def _gpu_part(draft: Draft, name: str, value: Any) -> Said:
    """All parts of the section are taken together, with the first of them."""
    given = draft.given["resources"]["gpu"]
    taken = [part for part in ("vendor", "name", "memory", "count") if given.get(part) is not None]
    if name.rpartition(".")[2] != taken[0]:
        return Said(f"resources.gpus: {shown(draft.get('resources.gpus', 'none'))}")
    names = given.get("name")
    return _gpus(
        draft,
        {
            **{part: given[part] for part in taken},
            **({"name": names if isinstance(names, list) else [names]} if names else {}),
        },
    )


def _gpus(draft: Draft, parts: Mapping[str, Any]) -> Said:
    vendor = str(parts.get("vendor", "nvidia")).lower()
    if vendor in ("google", "tpu", "intel", "tenstorrent", "tt"):
        raise Refuse(f"There is no engine for accelerators of {vendor}.", "Ask for GPUs of NVIDIA or AMD.")
    low, high = _range(parts.get("count", "1"))
    count = number(low or high or "0", "a number of GPUs", high=10**5)
    note = "" if low == high else "The least number of the range is held, and not more."
    if not count:
        return Said(draft.put("resources.gpus", "none"), note)
    memory = _gpu_memory(parts["memory"], bool(parts.get("name"))) if "memory" in parts else ""
    if vendor == "amd" and not parts.get("name"):
        raise Refuse("A vendor alone does not say which GPU.", "Name models too, such as MI300X.")
    wanted = []
    for model in parts.get("name") or [""]:
        if not model:
            wanted.append(f"{memory}:{count}" if memory else str(count))
            continue
        request = gpu_request(text(model), count)
        head, _, tail = request.rpartition(":")
        wanted.append(f"{head.split(':')[0] if memory else head}:{memory}:{tail}" if memory else request)
    draft.put("resources.gpus", wanted[0])
    if wanted[1:]:
        draft.put("resources.any_of", [{"gpus": one} for one in wanted[1:]])
    return Said(f"resources.gpus: {' or '.join(wanted)}", note)


def _gpu_memory(value: Any, has_name: bool) -> str:
    low, high = _range(value)
    if low == high:
        return size_text(low) if has_name else f"{size_text(low)}..{size_text(low)}"
    return f"{size_text(low or '0')}+" if not high else f"{size_text(low or '0')}..{size_text(high)}"


# --- when and where ---


def _nodes(draft: Draft, name: str, value: Any) -> str:
    return draft.put("nodes", number(value, "a number of nodes", low=1, high=4_096))


def _priority(draft: Draft, name: str, value: Any) -> str:
    return draft.put("priority", number(value, "a priority", high=100))


def _max_duration(draft: Draft, name: str, value: Any) -> str:
    if value in ("off", False):
        return "max_duration: 0"
    return draft.put("max_duration", _duration(value))


def _stop_duration(draft: Draft, name: str, value: Any) -> str:
    if value in ("off", False):
        raise Refuse("A worker is not given time without end.", "Write up to 24h.")
    return draft.put("checkpoint.grace", _duration(value))


_CAUSES: Final = {"no-capacity": (), "interruption": ("node_lost", "preempted"), "error": ("error",)}
_TRIES: Final = 1_000


def _retry(draft: Draft, name: str, value: Any) -> Said:
    if not flag(value):
        return Said(draft.put("retry", {"max": 0}))
    return Said(
        draft.put("retry", {"on": ["node_lost", "preempted", "error"], "max": _TRIES}),
        "Here they are bounded by number; there they end after an hour.",
    )


def _retry_events(draft: Draft, name: str, value: Any) -> Said:
    events = value if isinstance(value, list) else [value]
    if unknown := [one for one in events if not isinstance(one, str) or one not in _CAUSES]:
        raise Refuse(f"{shown(unknown[0])} is not an event.", "Events are no-capacity, interruption and error.")
    causes = [cause for event in events for cause in _CAUSES[event]]
    said = draft.put("retry", {"on": causes, "max": _TRIES} if causes else {"max": 0})
    return Said(said, "Without capacity, work waits in the queue in any case." if "no-capacity" in events else "")


def _retry_duration(draft: Draft, name: str, value: Any) -> Said:
    events = draft.given["retry"].get("on_events")
    if events not in (["no-capacity"], "no-capacity"):
        raise Refuse(
            "Retries are bounded by number, not by time.", "Leave it out and write retry.max in a Tidemill spec."
        )
    return Said(draft.put("start_before", f"in {_duration(value)}"), "Given up when it has not started by then.")


def _spot(draft: Draft, name: str, value: Any) -> Said:
    if value not in ("spot", "on-demand", "auto"):
        raise Refuse(f"{shown(value)} is not a policy.", "Write spot, on-demand or auto.")
    if value == "auto":
        return Said(draft.put("capacity", "on_demand"), "Either would do; the one that is not displaced is taken.")
    return Said(draft.put("capacity", value.replace("-", "_")))


def _choice(key: str) -> Any:
    """A rule for names of places: machines need to have one of them as a label."""

    def take(draft: Draft, name: str, value: Any) -> str:
        names = value if isinstance(value, list) else [value]
        if not names or not all(isinstance(one, str) and "/" not in one for one in names):
            raise Refuse(f"{shown(value)} is not a list of names.", "Write names, without a project before them.")
        return place(draft, key, "|".join(names))

    return take


def _tag(draft: Draft, name: str, value: Any) -> str:
    return label(draft, name.removeprefix("tags."), value)


# --- services and ports ---


def _volumes(draft: Draft, name: str, value: Any) -> str:
    """``NAME:/path``, or a mapping with ``name`` and ``path``; folders of the machine have no name."""
    told = []
    for one in value if isinstance(value, list) else [value]:
        known: Any
        at: Any
        if isinstance(one, str):
            known, _, at = one.rpartition(":")
        elif isinstance(one, dict):
            known, at = one.get("name", one.get("instance_path")), one.get("path")
        else:
            raise Refuse(f"{shown(one)} is not a volume.", "Write NAME:/path.")
        if isinstance(known, str) and known.startswith("/"):
            raise Refuse(
                f"{known} is a folder of whatever machine it is, which jobs do not see.",
                f"Have it made a volume: tidemill volume create NAME {known}. For a cache, use $XDG_CACHE_HOME.",
            )
        told.append(volume(draft, known, at))
    return "; ".join(told)


def _ports(draft: Draft, name: str, value: Any) -> Said:
    ports = [_container_port(one) for one in (value if isinstance(value, list) else [value])]
    draft.put("ports", list(dict.fromkeys(ports)))
    is_forwarded = any(isinstance(one, str) and ":" in one for one in (value if isinstance(value, list) else [value]))
    return Said(
        f"ports: {shown(ports)}", "Ports are not forwarded to where tidemill is called." if is_forwarded else ""
    )


def _container_port(value: Any) -> int:
    if isinstance(value, dict):
        return port_number(value.get("container_port"))
    return port_number(str(value).rpartition(":")[2] if isinstance(value, str) else value)


def _port(draft: Draft, name: str, value: Any) -> str:
    port = _container_port(value)
    known = draft.spec.setdefault("ports", [])
    if port not in known:
        known.append(port)
    return draft.put("service.port", port)


def _model(draft: Draft, name: str, value: Any) -> str:
    return draft.put("service.model", text(value))


def _replicas(draft: Draft, name: str, value: Any) -> Said:
    if isinstance(value, list):
        raise Refuse("Replicas are all alike.", "Submit a service for each group.")
    low, high = _range(value)
    if not high:
        raise Refuse(f"{shown(value)} has no most.", "Write how many replicas there are at most, such as 0..4.")
    least = number(low or 0, "a number of replicas", low=0, high=64)
    most = number(high, "a number of replicas", low=1, high=64)
    if least > most:
        raise Refuse(f"{shown(value)} ends before it begins.", "Write the smaller number first, such as 0..4.")
    if least == most:
        return Said(draft.put("service.replicas", least))
    if "scale_down_delay" not in (draft.given.get("scaling") or {}):
        draft.put("service.idle", _SCALE_DOWN)
    return Said(
        draft.put("service.replicas", f"{least}..{most}"), "The number follows the requests that are under way."
    )


def _scale_down_delay(draft: Draft, name: str, value: Any) -> str:
    return draft.put("service.idle", _duration(value))


def _probes(draft: Draft, name: str, value: Any) -> Said:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise Refuse(f"{shown(value)} is not a list of probes.", "Write a list with one probe.")
    if not value:
        return Said("service.readiness: an open port")
    if len(value) > 1:
        raise Refuse("A replica has one probe.", "Give the path that tells most.")
    inner = f"{name}[0]."
    walk(draft, _PROBE, value[0], inner)
    if "url" not in value[0]:
        draft.put("service.readiness.path", "/")
    return Said(f"service.readiness.path: {draft.get('service.readiness.path', '/')}")


def _probe_url(draft: Draft, name: str, value: Any) -> str:
    if not text(value).startswith("/"):
        raise Refuse(f"{shown(value)} is not a path.", "Write for example /health.")
    return draft.put("service.readiness.path", value)


_REPEATED: Final = (
    "Probes are repeated all the time; one that passes is enough, and one that fails holds requests back."
)
_BY_RATE: Final = (
    "The number of replicas follows the requests that are under way, not how many come a second.",
    "Take it out; in a Tidemill spec, service.concurrency says how many a replica takes at a time.",
)
_SCALE_DOWN: Final = "10m"

_PROBE: Final[dict[str, Rule]] = {
    "type": Rule(
        becomes="service.readiness",
        take=_only_without("Probes are HTTP requests.", "Write http.", "http"),
        example="http",
    ),
    "url": maps("service.readiness.path", _probe_url, example="/health"),
    "method": Rule(
        becomes="service.readiness",
        take=_only_without("Probes are GET requests.", "Give a path that answers GET.", "get"),
        example="get",
    ),
    "headers": refused(
        "Probes have no headers of their own.",
        "Give a path that answers without them.",
        example=[{"name": "X", "value": "y"}],
    ),
    "body": refused("Probes are GET requests.", "Give a path that answers GET.", example="{}"),
    "timeout": noted(_REPEATED, example="10s"),
    "interval": noted(_REPEATED, example="15s"),
    "ready_after": noted(_REPEATED, example=1),
    "until_ready": noted(_REPEATED, example=True),
}

FIELDS: Final[dict[str, Rule]] = {
    "type": maps("kind", _type, example="task"),
    "name": maps("name", _name, example="my-run"),
    "commands": maps("run", _commands, example=["python train.py"], note="It ends at the first command that fails."),
    "init": maps("setup", _init, example=["pip install -r requirements.txt"]),
    "setup": refused(
        "dstack does not run it any more.", "Put it at the beginning of commands.", example=["pip install x"]
    ),
    "image": maps("image", _image, example="docker.io/library/python:3.12"),
    "user": refused("A worker has the user that its machine gives it.", _LEAVE_OUT, example="ubuntu"),
    "privileged": Rule(
        take=_only_without("Workers are never privileged.", "See docs/security.md for what they may do.", False),
        example=False,
        limits="false only.",
    ),
    "entrypoint": refused(
        "The image's entrypoint is not run.", "Put it at the beginning of commands.", example="/entry.sh"
    ),
    "working_dir": maps("run: cd", _working_dir, example="src"),
    "home_dir": refused("The home folder is chosen by Tidemill.", "Use $HOME.", example="/root"),
    "registry_auth": section(
        {
            "username": refused(
                "Images are fetched with what the machines know of registries.",
                "Log in to the registry once on each machine.",
                example="me",
            ),
            "password": refused(
                "Images are fetched with what the machines know of registries.",
                "Log in to the registry once on each machine.",
                example="x",
                is_hidden=True,
            ),
        }
    ),
    "python": maps("env.python", _python, example="3.12"),
    "nvcc": Rule(
        take=_only_without(
            "CUDA's compiler is not installed for a job.",
            "Write an image that has it: image: nvidia/cuda:…-devel.",
            False,
        ),
        example=False,
        limits="false only.",
    ),
    "single_branch": noted("dstack asks how much of a repository to clone; nothing is cloned here.", example=True),
    "env": Rule(
        becomes="envs, secrets",
        take=_env,
        example=["SEED=1"],
        below={
            ANY: maps("envs, secrets", _env_item, example="1", takes_null=True),
        },
    ),
    "shell": Rule(take=_shell, example="bash", limits="bash and sh only."),
    "resources": section(
        {
            "cpu": maps(
                "resources.cpus",
                _cpu,
                example="4..",
                below={
                    "arch": maps("placement.labels.arch", _arch, example="x86"),
                    "count": maps("resources.cpus", _cores, example=4),
                    "min": maps("resources.cpus", _cores, example=4),
                    "max": noted("The least number of the range is held.", example=8),
                },
            ),
            "memory": maps("resources.memory", _memory, example="16GB..", note="So much is held; more is not had."),
            "shm_size": maps("image: its shared memory", _shared_memory, example="8GB"),
            "gpu": maps(
                "resources.gpus, resources.any_of",
                _gpu,
                example="A100:80GB:2",
                below={
                    "vendor": maps("resources.gpus", _gpu_part, example="nvidia"),
                    "name": maps("resources.gpus, resources.any_of", _gpu_part, example=["A100", "H100"]),
                    "count": maps("resources.gpus", _gpu_part, example=2),
                    "memory": maps("resources.gpus", _gpu_part, example="40GB.."),
                    "total_memory": refused(
                        "Memory is asked for of each GPU.", "Write memory and count.", example="160GB"
                    ),
                    "compute_capability": refused(
                        "GPUs are not asked for by what they can compute.",
                        "Name models: gpu: [A100, H100].",
                        example=8.0,
                    ),
                },
            ),
            "disk": maps(
                "resources.disk", _disk, example="100GB", below={"size": maps("resources.disk", _disk, example="100GB")}
            ),
        }
    ),
    "priority": maps("priority", _priority, example=50),
    "volumes": maps(
        "volumes",
        _volumes,
        example=["my-volume:/data"],
        note="A volume of that name: tidemill volume create.",
        limits="Names; no folders of the machine.",
    ),
    "docker": Rule(
        take=_only_without("There is no Docker in a worker.", "Write image for one container.", False),
        example=False,
        limits="false only.",
    ),
    "dstack": Rule(
        take=_only_without("There is no dstack in a worker.", "Jobs reach this cloud by $TIDEMILL_API_URL.", False),
        example=False,
        limits="false only.",
    ),
    "repos": maps("workdir", _repos, example=["."]),
    "repo_dir": refused("The work folder is where the worker starts.", "Use working_dir.", example="/workflow"),
    "files": maps("workdir", _files, example=["train.py"]),
    "ports": maps("ports", _ports, example=[8000]),
    "nodes": maps("nodes", _nodes, example=2, note="Workers may share a machine; placement.spread: host forbids it."),
    "groups": refused(
        "Workers of a gang, and replicas, are all alike.",
        "Submit one workload for each, with group for what starts together.",
        example=[{"name": "a"}],
    ),
    "max_duration": maps("max_duration", _max_duration, example="2h"),
    "stop_duration": maps("checkpoint.grace", _stop_duration, example="5m"),
    "utilization_policy": section(
        {
            "min_gpu_utilization": refused(
                "Jobs are not ended for using their GPUs little.",
                "Write max_duration, and look at tidemill top.",
                example=10,
            ),
            "time_window": refused(
                "Jobs are not ended for using their GPUs little.",
                "Write max_duration, and look at tidemill top.",
                example="1h",
            ),
        }
    ),
    "retry": maps(
        "retry",
        _retry,
        example=True,
        below={
            "on_events": maps("retry.on", _retry_events, example=["interruption", "error"]),
            "duration": maps(
                "start_before", _retry_duration, example="1h", limits="With on_events: [no-capacity] only."
            ),
        },
    ),
    "spot_policy": maps("capacity", _spot, example="spot"),
    "max_price": refused(
        "A workload has no ceiling on its price.", "See the price before: tidemill quote FILE.", example=1.5
    ),
    "backends": maps(
        "placement.labels.cloud",
        _choice("cloud"),
        example=["aws", "gcp"],
        note="Machines need to have the label; quote tells when none has.",
    ),
    "regions": maps(
        "placement.labels.region", _choice("region"), example=["eu-west-1"], note="Machines need to have the label."
    ),
    "availability_zones": maps(
        "placement.labels.zone", _choice("zone"), example=["eu-west-1a"], note="Machines need to have the label."
    ),
    "instance_types": refused(
        "They name machines of a cloud.", "Say what is needed of them: resources.", example=["p4d.24xlarge"]
    ),
    "reservation": refused(
        "It is a reservation with a cloud.",
        "Name one of this cloud in a Tidemill spec: reservation: NAME.",
        example="cr-1",
    ),
    "creation_policy": noted(_OWN_MACHINES, example="reuse"),
    "idle_duration": noted(_OWN_MACHINES, example="5m"),
    "startup_order": Rule(
        take=_only_without(
            "All workers of a gang start at once.",
            "Have workers wait for the first: a loop until its port answers.",
            "any",
        ),
        example="any",
        limits="any only.",
    ),
    "stop_criteria": Rule(
        take=_only_without(
            "A gang ends when all its workers have.", "Have the workers end when the first one does.", "all-done"
        ),
        example="all-done",
        limits="all-done only.",
    ),
    "schedule": section(
        {
            "cron": refused(
                "Workloads are not repeated.",
                "Call tidemill run from cron, or write start_after for once.",
                example="0 1 * * *",
            )
        }
    ),
    "fleets": maps(
        "placement.labels.fleet", _choice("fleet"), example=["my-fleet"], note="Machines need to have the label."
    ),
    "instances": refused(
        "Machines are not asked for by name.",
        "Give them a label and ask for that: placement.labels.",
        example=["my-fleet-0"],
    ),
    "tags": section({ANY: maps("labels", _tag, example="ml")}),
    "backend_options": refused("They are for clouds.", _LEAVE_OUT, example=[]),
    "ide": noted("Open a shell with tidemill attach, or let an editor use tidemill exec.", example="vscode"),
    "version": noted("It is the editor's.", example="1.0"),
    "inactivity_duration": Rule(
        take=_only_without("Workers are not ended for being left alone.", "Write max_duration.", "off", False),
        example="off",
        limits="off only.",
    ),
    "port": maps("service.port", _port, example=8000),
    "gateway": Rule(
        take=_only_without("This cloud has one gateway.", "Leave it out.", False), example=False, limits="false only."
    ),
    "strip_prefix": Rule(
        take=_only_without("Requests reach a replica without a prefix.", "Leave it out.", True),
        example=True,
        limits="true only.",
    ),
    "model": maps(
        "service.model",
        _model,
        example="llama-3.1-8b",
        below={
            "name": maps("service.model", _model, example="llama-3.1-8b"),
            "type": Rule(
                take=_only_without("Models are served as they are.", "Write chat.", "chat"),
                example="chat",
                limits="chat only.",
            ),
            "format": Rule(
                take=_only_without(
                    "The gateway speaks as OpenAI does.", "Serve it that way: format: openai.", "openai"
                ),
                example="openai",
                limits="openai only.",
            ),
            "prefix": Rule(
                take=_only_without("Models are found under /v1.", "Write /v1.", "/v1"),
                example="/v1",
                limits="/v1 only.",
            ),
            "chat_template": refused(
                "The gateway does not make prompts.", "Serve the model with its template.", example="{{ x }}"
            ),
            "eos_token": refused(
                "The gateway does not make prompts.", "Serve the model with its template.", example="</s>"
            ),
        },
    ),
    "https": Rule(
        take=_only_without(
            "The gateway does not end TLS.",
            "Write https: auto, and put a proxy with the certificate before it.",
            False,
            "auto",
        ),
        example="auto",
        limits="false and auto only.",
    ),
    "auth": Rule(
        take=_only_without("The gateway always asks for a token.", "Write auth: true.", True),
        example=True,
        limits="true only.",
    ),
    "scaling": section(
        {
            "metric": refused(*_BY_RATE, example="rps"),
            "target": refused(*_BY_RATE, example=10),
            "window": refused(*_BY_RATE, example="1m"),
            "scale_up_delay": refused(
                "Replicas are added as soon as requests need them.", "Take it out.", example="5m"
            ),
            "scale_down_delay": maps("service.idle", _scale_down_delay, example="10m", limits="Up to a day."),
        }
    ),
    "rate_limits": refused(
        "The gateway has no limits by rate.", "Put a proxy with them before it.", example=[{"rps": 4}]
    ),
    "replicas": maps(
        "service.replicas",
        _replicas,
        example=2,
        limits="A range needs its most; its service.idle is 10 minutes, as there, unless scale_down_delay is given.",
    ),
    "probes": maps("service.readiness", _probes, example=[{"type": "http", "url": "/health"}]),
}
