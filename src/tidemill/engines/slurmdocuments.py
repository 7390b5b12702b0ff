"""slurmrestd's documents, read and written, in the shapes of all its versions from v0.0.37 to v0.0.44; asks nobody.

What changed between them, as far as it is read here:

==========================  ===================================  ====================================================
what                        to v0.0.38                           from v0.0.39
==========================  ===================================  ====================================================
a number that may be none   a number or null                     ``{"set": true, "infinite": false, "number": 2}``
the state of a job          a word                               a list of words, from v0.0.40
the state of a node         a word, and ``state_flags``          a list of words
a job's exit code           as ``wait`` has it                   so in v0.0.39, then ``{"return_code", "signal"}``
variables of a job          an object                            a list of ``NAME=VALUE``
the nodes of a partition    a word                               ``{"configured": …}``
the warning                 ``signal``, to steps only            ``kill_warning_…``, to the batch script
==========================  ===================================  ====================================================

A version from v0.0.39 on was read of its published OpenAPI description; tried was slurm-wlm 22.05, which has v0.0.37
and v0.0.38. Source: https://slurm.schedmd.com/rest_api.html, the OpenAPI documents of Slurm 22.05 to 25.11.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from tidemill.engines.slurmending import Ending
from tidemill.engines.slurmport import LIVE, Held, SlurmJob, SlurmNode, Submission, gpus_of, host_names, surroundings
from tidemill.units import SECOND_NS

Document = Mapping[str, Any]
DATA_PARSER: Final = 39
"""The first version with the shapes of the right column."""
_SLASHED: Final = 40
"""The first version in which a gres is ``gres/gpu``."""
_JOB_FLAGS: Final = frozenset({
    "COMPLETING", "CONFIGURING", "EXPEDITING", "LAUNCH_FAILED", "POWER_UP_NODE", "RECONFIG_FAIL", "REQUEUED",
    "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING", "RESV_DEL_HOLD", "REVOKED", "SIGNALING", "SPECIAL_EXIT", "STAGE_OUT",
    "STOPPED", "UPDATE_DB",
})  # fmt: skip
_NUMBERS: Final = ("error_number", "error_code", "errno")
_TOLD_NOTHING: Final = ("", "None")


class Unreadable(ValueError):
    """A field of an answer is not what it has to be. ``field`` is where it is, ``value`` what is there."""

    def __init__(self, field: str, value: object, wanted: str) -> None:
        self.field = field
        self.value = value
        super().__init__(f"{field} is {value!r:.80}, and not {wanted}")


# ------------------------------------------------------------------ written


def submission(job: Submission, version: int) -> dict[str, Any]:
    """What is posted to have that job submitted.

    slurmrestd 22.05 takes the list of two numbers that it describes for ``nodes`` and gives one node, heeds no
    ``requeue`` that is false but the ``no_requeue`` that it does not describe, and takes no ``B:`` in ``signal``.
    """
    written: dict[str, Any] = {
        "name": job.name,
        "comment": job.comment,
        "current_working_directory": job.folder,
        "standard_output": "/dev/null",
        "tasks": job.nodes,
        "tasks_per_node": 1,
        "cpus_per_task": job.cpus,
        **{"constraints" if name == "constraint" else name: value for name, value in job.options},
    }
    gpus = f"gpu:{job.gpu_kind}{':' if job.gpu_kind else ''}{job.gpus}" if job.gpus else ""
    variables = surroundings()
    if version < DATA_PARSER:
        written |= {"nodes": f"{job.nodes}-{job.nodes}", "environment": variables, "no_requeue": True}
        written |= {"memory_per_node": job.memory_mib} if job.memory_mib else {}
        written |= {"time_limit": job.minutes} if job.minutes else {}
        written |= {"signal": f"TERM@{job.warning_s}"} if job.warning_s else {}
        written |= {"gres": gpus} if gpus else {}
    else:
        written |= {
            "minimum_nodes": job.nodes,
            "maximum_nodes": job.nodes,
            "minimum_cpus": job.nodes * job.cpus,
            "environment": [f"{name}={value}" for name, value in variables.items()],
            "requeue": False,
        }
        written |= {"memory_per_node": _set(job.memory_mib)} if job.memory_mib else {}
        written |= {"time_limit": _set(job.minutes)} if job.minutes else {}
        if job.warning_s:
            written |= {"kill_warning_signal": "TERM", "kill_warning_flags": ["BATCH_JOB"]}
            written |= {"kill_warning_delay": _set(job.warning_s)}
        written |= {"tres_per_node": f"gres{'/' if version >= _SLASHED else ':'}{gpus}"} if gpus else {}
    return {"script": job.script, "job": written}


def _set(number: int) -> dict[str, Any]:
    return {"set": True, "infinite": False, "number": number}


# ------------------------------------------------------------------ read


def items(document: Document, name: str) -> list[Document]:
    """The list of that name. Raises, as all here: Unreadable."""
    found = document.get(name)
    if not isinstance(found, list) or not all(isinstance(each, Mapping) for each in found):
        raise Unreadable(name, found, "a list of objects")
    return found


def job_number(document: Document) -> str:
    """The number of the job that was submitted."""
    number = _number(document.get("job_id"), "job_id")
    if not number:
        raise Unreadable("job_id", document.get("job_id"), "the number of a job")
    return str(number)


def user_of(job: Document) -> str:
    """The name of the user whose job it is; their number where slurmrestd knows no name."""
    return str(job.get("user_name") or job.get("user_id", ""))


def job(document: Document, where: str) -> SlurmJob:
    """A job of the list."""
    words = _words(document.get("job_state"), f"{where}.job_state")
    count = max(1, _number(document.get("node_count"), f"{where}.node_count") or 1)
    cpus = _number(document.get("cpus"), f"{where}.cpus") or 0
    mib = _number(document.get("memory_per_node"), f"{where}.memory_per_node")
    each = _number(document.get("memory_per_cpu"), f"{where}.memory_per_cpu") or 0
    return SlurmJob(
        id=job_number(document),
        name=_text(document, "name", where),
        state=next((word for word in words if word in LIVE and word in _JOB_FLAGS), _base(words)),
        reason=_text(document, "state_reason", where),
        nodes=_text(document, "nodes", where),
        node_count=count,
        cpus=cpus,
        memory_bytes=(each * cpus // count if mib is None else mib) * 2**20,
        gpus=gpus_of(_text(document, "tres_per_node", where)),
    )


def node(document: Document, where: str, partitions: Mapping[str, Sequence[str]] | None) -> SlurmNode:
    """A node of the list. ``partitions`` has those of each node; None: the node says its own."""
    name = _text(document, "name", where)
    states = {*_words(document.get("state"), f"{where}.state"), *_flags(document.get("state_flags"))}
    boot_s = _number(document.get("boot_time"), f"{where}.boot_time") or 0
    own = partitions.get(name, ()) if partitions is not None else document.get("partitions") or ()
    numbers = {
        key: _number(document.get(key), f"{where}.{key}") or 0
        for key in ("cpus", "real_memory", "temporary_disk", "alloc_cpus", "alloc_memory")
    }
    return SlurmNode(
        name=name,
        states=frozenset(states),
        partitions=tuple(own),
        address=_text(document, "address", where) or name,
        boot=time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(boot_s)) if boot_s else "None",  # as scontrol has it
        cpus=max(1, numbers["cpus"]),
        memory_mib=numbers["real_memory"],
        disk_mib=numbers["temporary_disk"],
        gres=_text(document, "gres", where),
        held=Held(
            cpus=numbers["alloc_cpus"],
            memory_bytes=numbers["alloc_memory"] * 2**20,
            gpus=gpus_of(_text(document, "gres_used", where)),
        ),
    )


def partitions_by_node(partitions: Sequence[Document]) -> dict[str, list[str]]:
    """The partitions of each node. slurmrestd 22.05 tells only the first one of them with the node itself."""
    found: dict[str, list[str]] = {}
    for at, each in enumerate(partitions):
        nodes = each.get("nodes")
        listed = nodes.get("configured") if isinstance(nodes, Mapping) else nodes
        for name in host_names(str(listed or "")):
            found.setdefault(name, []).append(_text(each, "name", f"partitions[{at}]"))
    return found


def ended(document: Document, where: str) -> Ending:
    """How a job of slurmctld's list ended."""
    began_s = _number(document.get("start_time"), f"{where}.start_time") or 0
    over_s = _number(document.get("end_time"), f"{where}.end_time") or 0
    return Ending(
        job=job_number(document),
        state=_base(_words(document.get("job_state"), f"{where}.job_state")),
        code=_code(document.get("exit_code"), f"{where}.exit_code"),
        nodes=_told(_text(document, "nodes", where)),
        reason=_told(_text(document, "state_reason", where)),
        ran_s=over_s - began_s if 0 < began_s <= over_s else None,
    )


def accounted(document: Document, where: str) -> Ending:
    """How a job of the accounting ended."""
    state, spent = _part(document, "state", where), _part(document, "time", where)
    total = _part(spent, "total", f"{where}.time")
    used_s = _number(total.get("seconds"), f"{where}.time.total.seconds")
    return Ending(
        job=job_number(document),
        state=_base(_words(state.get("current"), f"{where}.state.current")),
        code=_code(document.get("exit_code"), f"{where}.exit_code"),
        nodes=_told(_text(document, "nodes", where).replace("None assigned", "")),
        ran_s=_number(spent.get("elapsed"), f"{where}.time.elapsed"),
        cpu_used_ns=None if used_s is None else used_s * SECOND_NS,
    )


def errors(document: Document) -> Iterator[tuple[int, str]]:
    """Slurm's number, zero for none, and the words of each error in an answer."""
    found = document.get("errors")
    for each in found if isinstance(found, list) else ():
        if isinstance(each, Mapping):
            number = next((each[name] for name in _NUMBERS if isinstance(each.get(name), int)), 0)
            said = [str(each[name]) for name in ("error", "description") if each.get(name)]
            yield number, ": ".join(dict.fromkeys(said))


def _number(value: Any, field: str) -> int | None:
    """A number in either shape; None where it is not set."""
    if isinstance(value, Mapping):
        if value.get("set") is False or value.get("infinite") is True:
            return None
        value = value.get("number")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unreadable(field, value, "a number")
    return value


def _words(value: Any, field: str) -> tuple[str, ...]:
    """The words of a state in either shape, as Slurm's commands write them."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not found or not all(isinstance(word, str) and word for word in found):
        raise Unreadable(field, value, "a state")
    return tuple(word.upper() for word in found)


def _flags(value: Any) -> tuple[str, ...]:
    return _words(value, "state_flags") if value else ()


def _base(words: Sequence[str]) -> str:
    return next((word for word in words if word not in _JOB_FLAGS), words[0])


def _code(value: Any, field: str) -> str:
    """``CODE:SIGNAL``, as Slurm's commands write an exit code."""
    if isinstance(value, Mapping) and ("return_code" in value or "signal" in value):
        signal = value.get("signal")
        number = (
            (signal.get("id") if "id" in signal else signal.get("signal_id")) if isinstance(signal, Mapping) else None
        )
        code = _number(value.get("return_code"), f"{field}.return_code") or 0
        return f"{code}:{_number(number, f'{field}.signal') or 0}"
    status = _number(value, field) or 0
    return f"{status >> 8 & 0xFF}:{status & 0x7F}"


def _text(document: Document, name: str, where: str) -> str:
    value = document.get(name)
    if value is not None and not isinstance(value, str):
        raise Unreadable(f"{where}.{name}", value, "a text")
    return value or ""


def _part(document: Document, name: str, where: str) -> Document:
    value = document.get(name)
    if not isinstance(value, Mapping):
        raise Unreadable(f"{where}.{name}", value, "an object")
    return value


def _told(value: str) -> str:
    return "" if value in _TOLD_NOTHING else value
