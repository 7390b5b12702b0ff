"""Scripts with #SBATCH lines: what becomes of each option.

Source: the manual page of sbatch, Slurm 22.05 to 24.11.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any, Final

from tidemill.sdk.compat import sbatch_body
from tidemill.sdk.compat.mapping import (
    Refuse,
    Rule,
    Said,
    Surroundings,
    label,
    maps,
    name_text,
    noted,
    number,
    place,
    refused,
    shown,
    walk,
)
from tidemill.sdk.compat.sbatch_shape import ScriptDraft
from tidemill.sdk.compat.sbatch_values import (
    Indices,
    array_of,
    bytes_of,
    duration_text,
    moment_of,
    seconds_of,
    size_text,
)
from tidemill.wire.checks import Refusal, slurm_word_of

SHORT: Final = {
    "A": "account",
    "a": "array",
    "b": "begin",
    "D": "chdir",
    "M": "clusters",
    "C": "constraint",
    "S": "core-spec",
    "c": "cpus-per-task",
    "d": "dependency",
    "m": "distribution",
    "e": "error",
    "x": "exclude",
    "B": "extra-node-info",
    "G": "gpus",
    "h": "help",
    "H": "hold",
    "i": "input",
    "J": "job-name",
    "k": "no-kill",
    "L": "licenses",
    "F": "nodefile",
    "w": "nodelist",
    "N": "nodes",
    "n": "ntasks",
    "o": "output",
    "O": "overcommit",
    "s": "oversubscribe",
    "p": "partition",
    "q": "qos",
    "Q": "quiet",
    "t": "time",
    "V": "version",
    "v": "verbose",
    "W": "wait",
}
_FLAGS: Final = frozenset(
    (
        "contiguous",
        "help",
        "hold",
        "ignore-pbs",
        "no-requeue",
        "overcommit",
        "oversubscribe",
        "parsable",
        "quiet",
        "reboot",
        "requeue",
        "spread-job",
        "stepmgr",
        "test-only",
        "usage",
        "use-min-nodes",
        "verbose",
        "version",
        "wait",
        "resv-ports",
        "consolidate-segments",
    )
)
_OPTIONAL: Final = frozenset(("exclusive", "get-user-env", "nice", "no-kill", "propagate"))
_REMARK: Final = re.compile(r"\s#.*$")


def read(script: str, surroundings: Surroundings) -> ScriptDraft:
    """A draft that is filled from a script."""
    options, lines, passed = _options(script)
    given = {name: value for name, value, _ in options}
    body = sbatch_body.analysed(script)
    draft = ScriptDraft(surroundings, lines, given, body)
    for name, value, line in passed:
        draft.tell(
            f"{name} (line {line})",
            value,
            note="It is below the first command, where Slurm does not read it either.",
            line=line,
        )
    seen: dict[str, int] = {}
    for name, value, line in options:
        if value is not given[name] or (name in seen and lines[name] != line):
            draft.tell(
                f"{name} (line {line})", value, note=f"It is given again in line {lines[name]}, which holds.", line=line
            )
        seen[name] = line
    walk(draft, FIELDS, given)
    draft.shape.put(draft)
    for step in body.steps:
        _step(draft, step)
    for line, words in body.modules:
        note = "Where the machine's shells have no modules, the line says so and the script goes on."
        draft.tell(f"module (line {line})", words, "run", note, line=line)
    _finish(draft, given, body)
    return draft


def _options(script: str) -> tuple[list[tuple[str, str, int]], dict[str, int], list[tuple[str, str, int]]]:
    """Options with their values and lines, the line that holds for each, and those below the first command."""
    holds: list[tuple[str, str, int]] = []
    passed: list[tuple[str, str, int]] = []
    lines: dict[str, int] = {}
    is_over = False
    for index, line in enumerate(script.splitlines(), 1):
        if line.startswith("#SBATCH") and not line.startswith("#SBATCH#"):
            for name, value in _parsed(line[len("#SBATCH") :]):
                (passed if is_over else holds).append((name, value, index))
                if not is_over:
                    lines[name] = index
        elif line.strip() and not line.lstrip().startswith("#"):
            is_over = True
    return holds, lines, passed


def _parsed(line: str) -> Iterator[tuple[str, str]]:
    """The options of one line, by their long names."""
    try:
        words = shlex.split(line)
    except ValueError:
        try:
            words = shlex.split(_REMARK.sub("", line))
        except ValueError:
            words = [line.strip()]
    while words and not words[0].startswith("#"):
        word = words.pop(0)
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            name, word = _whole(name), f"--{name}"
        elif word.startswith("-") and len(word) > 1:
            name, value = SHORT.get(word[1], word[1]), word[2:].removeprefix("=")
            if name in _FLAGS and value:
                words.insert(0, f"-{value}")
                value = ""
            equals = value
        else:
            yield word, ""
            continue
        if not equals and words and f"--{name}" in FIELDS and needs_value(f"--{name}"):
            value = words.pop(0)
        yield f"--{name}" if f"--{name}" in FIELDS else word, value


def takes_value(name: str) -> bool:
    """Whether an option such as ``--nice`` can have a value."""
    return name[2:] not in _FLAGS


def needs_value(name: str) -> bool:
    """Whether an option has a value always, so that the next word is it."""
    return takes_value(name) and name[2:] not in _OPTIONAL


def _whole(name: str) -> str:
    """An option's name for one that is cut short, as getopt has it."""
    if f"--{name}" in FIELDS:
        return name
    longer = [known[2:] for known in FIELDS if known.startswith(f"--{name}")]
    return longer[0] if len(longer) == 1 else name


def _finish(draft: ScriptDraft, given: Mapping[str, str], body: sbatch_body.Body) -> None:
    if "--chdir" not in given:
        draft.default(
            "--chdir",
            draft.put("workdir", "."),
            "The folder that tidemill is called in is taken along, as a copy: keep results in $TIDEMILL_OUTPUT_DIR.",
        )
    if "--export" not in given:
        draft.default("--export", "envs: those of the script", _NO_LOGIN)
    if "--requeue" not in given and "--no-requeue" not in given:
        draft.default("--requeue", "retry: {on: [node_lost, preempted], max: 3}", "Ours when nothing is said.")
    if draft.environment:
        told = {name: str(value) for name, value in draft.environment.items()}
        draft.spec["envs"] = {**told, **draft.spec.get("envs", {})}
    array: Indices | None = None
    if "--array" in given and "array" in draft.spec:
        array = array_of(given["--array"])
        if array.ids[0] == 0 and array.step == 1:
            array = None
    draft.spec["run"] = sbatch_body.run_text(body, array=array)


def _step(draft: ScriptDraft, step: sbatch_body.Step) -> None:
    shape = draft.shape
    name = f"srun (line {step.line})"
    if step.unknown:
        draft.refuse(
            name,
            step.words,
            f"Its option {step.unknown[0]} is not one that a worker can follow.",
            "Leave it out, or start the program without srun.",
            line=step.line,
        )
    elif (step.tasks and step.tasks != shape.tasks) or (step.nodes and step.nodes != shape.nodes):
        draft.refuse(
            name,
            step.words,
            "It starts on a part of the job only.",
            "Submit that part as a workload of its own, with after for the order.",
            line=step.line,
        )
    else:
        many = shape.workers > 1
        becomes = f"run: the command, in each of {shape.workers} workers" if many else "run: the command"
        note = "The lines around it are run in each worker too." if many else ""
        draft.tell(name, step.words, becomes, note, line=step.line)


# --- options ---


def _geometry(draft: ScriptDraft, name: str, value: Any) -> Said:
    return draft.shape.said(name)


def _account(draft: ScriptDraft, name: str, value: Any) -> str:
    draft.environment["SLURM_JOB_ACCOUNT"] = value
    return f"{draft.put('project', value)}, {_told(draft, 'account', value)}"


def _partition(draft: ScriptDraft, name: str, value: Any) -> str:
    draft.environment["SLURM_JOB_PARTITION"] = value.split(",")[0]
    return place(draft, "partition", "|".join(part for part in value.split(",") if part))


def _qos(draft: ScriptDraft, name: str, value: Any) -> str:
    draft.environment["SLURM_JOB_QOS"] = value
    if value in ("low", "normal", "high"):
        return draft.put("priority", value)
    return _told(draft, "qos", value)


def _told(draft: ScriptDraft, what: str, word: str) -> str:
    """Have Slurm told a word of its own, at a site that has it. Raises: Refuse."""
    try:
        return draft.put(f"slurm.{what}", slurm_word_of(word))
    except Refusal as refusal:
        context = refusal.context or {}
        raise Refuse(str(context["detail"]), str(context["mend"])) from refusal


def _array(draft: ScriptDraft, name: str, value: Any) -> Said:
    array = array_of(value)
    draft.put("array", {"size": len(array.ids), **({"parallel": array.parallel} if array.parallel else {})})
    note = (
        ""
        if array.ids[0] == 0 and array.step == 1
        else "SLURM_ARRAY_TASK_ID has Slurm's ids; TIDEMILL_ARRAY_INDEX counts from 0."
    )
    return Said(f"array: {shown(draft.spec['array'])}", note)


def _begin(draft: ScriptDraft, name: str, value: Any) -> str:
    around = draft.surroundings
    return draft.put("start_after", moment_of(value, now_ns=around.now_ns, offset_s=around.offset_s))


def _deadline(draft: ScriptDraft, name: str, value: Any) -> Said:
    around = draft.surroundings
    when = moment_of(value, now_ns=around.now_ns, offset_s=around.offset_s)
    limit = seconds_of(draft.given.get("--time-min") or draft.given.get("--time") or "0")
    if not limit:
        raise Refuse("Without --time it is not known when it would have to start.", "Give --time, or start_before.")
    if when.startswith("in "):
        left = int(when[3:-1]) - limit
        if left <= 0:
            raise Refuse("It could not end before the deadline.", "Give a later deadline.")
        return Said(
            draft.put("start_before", f"in {left}s"), "The latest time at which it can start and end before it."
        )
    from datetime import datetime, timedelta

    latest = datetime.fromisoformat(when) - timedelta(seconds=limit)
    return Said(
        draft.put("start_before", latest.strftime("%Y-%m-%dT%H:%M:%SZ")),
        "The latest time at which it can start and end before it.",
    )


def _time(draft: ScriptDraft, name: str, value: Any) -> Said:
    limit = seconds_of(value)
    if not limit:
        return Said("max_duration: 0")
    early = 0
    if "--signal" in draft.given:
        match = _SIGNAL.fullmatch(draft.given["--signal"])
        early = min(int(match[3] or 60), limit - 1) if match and match[2] in _TERM else 0
    return Said(
        draft.put("max_duration", duration_text(limit - early)),
        "The time of --signal is taken off, and given as grace." if early else "",
    )


_SIGNAL: Final = re.compile(r"(?:([RB]{1,2}):)?(?:SIG)?([A-Z0-9]+)(?:@(\d+))?", re.IGNORECASE)
_TERM: Final = ("TERM", "15")


def _signal(draft: ScriptDraft, name: str, value: Any) -> Said:
    match = _SIGNAL.fullmatch(value)
    if match is None or match[2].upper() not in _TERM:
        raise Refuse(
            "A worker that has to end is sent SIGTERM.", "Handle SIGTERM: --signal=TERM@60, and save a checkpoint then."
        )
    note = "All processes of a worker get it, not the script alone." if match[1] and "B" in match[1].upper() else ""
    return Said(draft.put("checkpoint.grace", duration_text(min(int(match[3] or 60), 86_400))), note)


def _dependency(draft: ScriptDraft, name: str, value: Any) -> str:
    ways = {"afterok": "ok", "afterany": "any", "afternotok": "failed"}
    if "?" in value:
        raise Refuse("All of what is named has to have ended, not any.", "Separate with commas.")
    after: dict[str, list[str]] = {}
    for part in value.split(","):
        how, _, names = part.partition(":")
        if how not in ways:
            raise Refuse(
                f"{how} is not a way to wait here.",
                "Wait for the end with afterok, afterany or afternotok; array.parallel: 1 runs one at a time.",
            )
        for one in names.split(":"):
            if not one or one.isdecimal() or ("_" in one and one.split("_")[0].isdecimal()):
                raise Refuse(
                    f"{shown(one)} is a job's number in Slurm.",
                    "Name the workload, or its id: afterok:prepare; see tidemill ps.",
                )
            after.setdefault(ways[how], []).append(one)
    return draft.put("after", after)


def _export(draft: ScriptDraft, name: str, value: Any) -> Said:
    around = draft.surroundings
    parts = [part for part in value.split(",") if part]
    words = []
    for part in parts:
        variable, equals, setting = part.partition("=")
        if part.upper() in ("ALL", "NONE", "NIL"):
            continue
        if not equals and variable not in around.environ and variable not in around.given:
            raise Refuse(f"{variable} has no value here.", f"Write {variable}=VALUE.")
        draft.spec.setdefault("envs", {})[variable] = (
            setting if equals else around.given.get(variable, around.environ.get(variable))
        )
        words.append(f"envs.{variable}")
    return Said(
        "; ".join(words) or "envs: those of the script", _NO_LOGIN if "ALL" in (part.upper() for part in parts) else ""
    )


_NO_LOGIN: Final = "Variables of where tidemill is called are not taken along; name those that are needed: --env NAME."


def _chdir(draft: ScriptDraft, name: str, value: Any) -> Said:
    return Said(
        draft.put("workdir", value), "A copy of the folder is taken along: keep results in $TIDEMILL_OUTPUT_DIR."
    )


def _job_name(draft: ScriptDraft, name: str, value: Any) -> Said:
    said = name_text(value)
    return Said(draft.put("name", said.becomes), said.note)


def _label(key: str) -> Any:
    return lambda draft, _, value: label(draft, key, value)


def _log(draft: ScriptDraft, name: str, value: Any) -> str:
    return "log: tidemill logs NAME"


def _stdin(draft: ScriptDraft, name: str, value: Any) -> Said:
    if value != "/dev/null":
        raise Refuse("A worker has no standard input.", "Read the file in the script: COMMAND < FILE.")
    return Said("", "As it is here.")


def _nice(draft: ScriptDraft, name: str, value: Any) -> str:
    text = value or "100"
    if not re.fullmatch(r"-?\d+", text) or not -1_000 <= int(text) <= 1_000:
        raise Refuse(f"{shown(value)} is beyond what priorities can be.", "Write --nice=-1000 to --nice=1000.")
    return draft.put("priority", -int(text))


def _reservation(draft: ScriptDraft, name: str, value: Any) -> str:
    if "," in value:
        raise Refuse("A workload runs in one reservation.", "Name one.")
    return draft.put("reservation", value)


def _requeue(draft: ScriptDraft, name: str, value: Any) -> str:
    return draft.put("retry", {"on": ["node_lost", "preempted"], "max": 1_000})


def _no_requeue(draft: ScriptDraft, name: str, value: Any) -> str:
    return draft.put("retry", {"max": 0})


def _switches(draft: ScriptDraft, name: str, value: Any) -> Said:
    if value.partition("@")[0] != "1":
        raise Refuse(
            "How many switches lie between workers is not counted.", "Write --switches=1, or placement.prefer."
        )
    return Said(draft.put("placement.prefer", "rack"), "Workers lie as near to each other as there is room.")


def _disk(draft: ScriptDraft, name: str, value: Any) -> str:
    return draft.put("resources.disk", size_text(bytes_of(value)))


def _constraint(draft: ScriptDraft, name: str, value: Any) -> Said:
    return draft.shape.said(name)


def _only(what: str, instead: str, *accepted: str) -> Any:
    def take(draft: ScriptDraft, name: str, value: Any) -> Said:
        if value in accepted:
            return Said("", "As it is here.")
        raise Refuse(what, instead)

    return take


def _seconds_least(draft: ScriptDraft, name: str, value: Any) -> Said:
    seconds_of(value)
    return Said("", "The limit is not shortened to start earlier; --time holds.")


def _delay(draft: ScriptDraft, name: str, value: Any) -> Said:
    number(value, "a number of minutes", high=10**6)
    return Said("", "Machines are not rebooted for a job.")


_SHAPE_OF_MACHINE: Final = "Machines are not asked for by their sockets and cores."
_ASK_CORES: Final = "Ask for cores: --cpus-per-task."
_BINDING: Final = "A worker sees its own cores and GPUs only; how they are bound can change its speed alone."
_CLOCKS: Final = "Clocks stay as they are; only speed and energy could differ."
_SUBMITTING: Final = (
    "It is about the call of sbatch: tidemill run shows the output until the job ends, or returns with -d."
)
_MAIL: Final = "No mail is sent; tidemill ps and GET /v1/events tell of it."
_RANKS: Final = "Ranks are numbered machine by machine."
_STORAGE: Final = "There are no burst buffers."
_CRAY: Final = "It is for Cray systems."
_CALL_ONLY: Final = "It keeps sbatch from submitting."


def _geometric(becomes: str, example: str, note: str = "", limits: str = "") -> Rule:
    return maps(becomes, _geometry, example=example, note=note, limits=limits)


FIELDS: Final[dict[str, Rule]] = {
    "--account": maps(
        "project, slurm.account",
        _account,
        example="research",
        note="The project that pays has to have that name; run --project goes over it. Slurm is told it, too.",
    ),
    "--acctg-freq": noted("Usage is metered all the time.", example="task=30"),
    "--array": maps("array", _array, example="0-15%4"),
    "--batch": refused("The first worker's machine is not chosen apart.", "Leave it out.", example="haswell"),
    "--bb": refused(_STORAGE, "Keep data as an artifact: inputs.", example="type=scratch"),
    "--bbf": refused(_STORAGE, "Keep data as an artifact: inputs.", example="buffer.txt"),
    "--begin": maps("start_after", _begin, example="now+1hour"),
    "--chdir": maps("workdir", _chdir, example="."),
    "--cluster-constraint": refused(
        "There is one cluster.", "Ask for machines with a label: placement.labels.", example="big"
    ),
    "--clusters": refused("There is one cluster.", "Ask for machines with a label: placement.labels.", example="other"),
    "--comment": maps("labels.comment", _label("comment"), example="a remark"),
    "--consolidate-segments": refused(
        "Gangs are not cut into segments.", "Write placement.within or prefer in a Tidemill spec.", example=""
    ),
    "--constraint": maps(
        "resources.gpus",
        _constraint,
        example="a100",
        limits="Names of GPUs only; other features are refused: placement.labels.",
    ),
    "--container": refused(
        "Bundles of a container are not run.", "Name an image in a Tidemill spec: image.", example="/bundle"
    ),
    "--container-id": refused(
        "Bundles of a container are not run.", "Name an image in a Tidemill spec: image.", example="a"
    ),
    "--contiguous": noted(_RANKS + " Workers are put near to each other where there is room.", example=""),
    "--core-spec": noted("What the system needs of a machine is kept by its settings.", example="1"),
    "--cores-per-socket": refused(_SHAPE_OF_MACHINE, _ASK_CORES, example="8"),
    "--cpu-freq": noted(_CLOCKS, example="high"),
    "--cpus-per-gpu": _geometric("resources.cpus", "4"),
    "--cpus-per-task": _geometric("resources.cpus", "4"),
    "--deadline": maps("start_before", _deadline, example="now+10hours", note="Less --time: the latest start."),
    "--delay-boot": maps("", _delay, example="10"),
    "--dependency": maps(
        "after", _dependency, example="afterok:prepare", limits="Workloads by name or id, not by Slurm's numbers."
    ),
    "--distribution": Rule(
        take=_only(
            "Ranks are numbered machine by machine.",
            "Write --distribution=block.",
            "block",
            "*",
            "block:block",
            "block:cyclic",
            "block:*",
        ),
        example="block",
        limits="block only.",
    ),
    "--error": maps("log", _log, example="%x-%j.err", note="Both outputs go to the job's log."),
    "--exclude": refused(
        "Machines are not left out by name.",
        "Cordon them, or ask for a label that others have: placement.labels.",
        example="node[1-2]",
    ),
    "--exclusive": refused(
        "Machines are shared; what a job holds is its own.",
        "Ask for all of a machine's GPUs and cores; placement.spread: host keeps workers apart.",
        example="",
    ),
    "--export": maps("envs", _export, example="NONE,SEED=1"),
    "--export-file": refused(
        "Variables are not read from a file.", "Name them: --export=NAME=VALUE, or envs.", example="vars"
    ),
    "--extra": maps("labels.extra", _label("extra"), example="x=1"),
    "--extra-node-info": refused(_SHAPE_OF_MACHINE, _ASK_CORES, example="2:8:1"),
    "--get-user-env": refused(
        "The shell's variables of where tidemill is called are not taken along.",
        "Name those that are needed: --export=NAME.",
        example="",
    ),
    "--gid": refused("A worker has the user that its machine gives it.", "Leave it out.", example="users"),
    "--gpu-bind": noted(_BINDING, example="closest"),
    "--gpu-freq": noted(_CLOCKS, example="high"),
    "--gpus": _geometric("resources.gpus", "2"),
    "--gpus-per-node": _geometric("resources.gpus", "a100:2"),
    "--gpus-per-socket": refused(_SHAPE_OF_MACHINE, "Ask for GPUs: --gpus-per-node.", example="2"),
    "--gpus-per-task": _geometric("resources.gpus", "1"),
    "--gres": _geometric("resources.gpus", "gpu:a100:2", limits="gpu only."),
    "--gres-flags": noted(_BINDING, example="enforce-binding"),
    "--help": refused(_CALL_ONLY, "Take it out.", example=""),
    "--hint": noted(_BINDING, example="nomultithread"),
    "--hold": refused("Jobs are not held.", "Submit it later, or with --begin.", example=""),
    "--ignore-pbs": noted("Lines of other systems are comments here.", example=""),
    "--input": maps("", _stdin, example="/dev/null", limits="/dev/null only."),
    "--job-name": maps("name", _job_name, example="train"),
    "--kill-on-invalid-dep": Rule(
        take=_only("A job whose dependency fails ends.", "Write yes.", "yes"), example="yes", limits="yes only."
    ),
    "--licenses": refused(
        "Licenses are not counted.",
        "Run as many at a time as there are: array.parallel, or a limit of the queue.",
        example="matlab:1",
    ),
    "--mail-type": noted(_MAIL, example="END,FAIL"),
    "--mail-user": noted(_MAIL, example="me"),
    "--mcs-label": refused(
        "There are no security labels of that kind.", "Projects keep work apart: --account.", example="a"
    ),
    "--mem": _geometric("resources.memory", "16G"),
    "--mem-bind": noted(_BINDING, example="local"),
    "--mem-per-cpu": _geometric("resources.memory", "2G"),
    "--mem-per-gpu": _geometric("resources.memory", "20G"),
    "--mincpus": _geometric("resources.cpus", "8"),
    "--network": refused(_CRAY, "Leave it out.", example="devices"),
    "--nice": maps("priority", _nice, example="100", note="The other way round: nice 100 is priority -100."),
    "--no-kill": Rule(
        take=_only(
            "A gang ends with a worker that is lost, and is tried again.",
            "Ask for a range of nodes: --nodes=2-4.",
            "off",
        ),
        example="off",
        limits="off only.",
    ),
    "--no-requeue": maps("retry.max: 0", _no_requeue, example=""),
    "--nodefile": refused(
        "Machines are not asked for by name.", "Give them a label and ask for that: placement.labels.", example="hosts"
    ),
    "--nodelist": refused(
        "Machines are not asked for by name.",
        "Give them a label and ask for that: placement.labels.",
        example="node[1-2]",
    ),
    "--nodes": _geometric("nodes", "1", limits="Of several nodes, each task that srun starts is a worker."),
    "--ntasks": _geometric(
        "nodes, resources.cpus", "4", limits="Workers when srun starts them; else cores of one worker."
    ),
    "--ntasks-per-core": noted(_BINDING, example="1"),
    "--ntasks-per-gpu": _geometric("nodes", "1"),
    "--ntasks-per-node": _geometric("nodes, resources.cpus", "4"),
    "--ntasks-per-socket": noted(_BINDING, example="2"),
    "--oom-kill-step": noted("A worker that runs out of memory ends, and its gang with it.", example="1"),
    "--open-mode": noted("Each attempt has a log of its own.", example="append"),
    "--output": maps("log", _log, example="%x-%A_%a.out", note="Both outputs go to the job's log."),
    "--overcommit": refused("What a worker holds is its own.", "Ask for fewer cores: --cpus-per-task.", example=""),
    "--oversubscribe": noted("Machines are shared in any case; what a job holds is its own.", example=""),
    "--parsable": noted(_SUBMITTING, example=""),
    "--partition": maps(
        "placement.labels.partition",
        _partition,
        example="gpu",
        note="Machines need to have the label, as those of a site with Slurm do; quote tells when none has.",
    ),
    "--power": noted(_CLOCKS, example="level"),
    "--prefer": noted("It is a wish only; where workers are put is for the scheduler to say.", example="a100"),
    "--priority": refused(
        "Its numbers are those of Slurm's own weights.",
        "Write --nice, or run --priority low, normal or high.",
        example="1000",
    ),
    "--profile": Rule(
        take=_only("Profiles are not written to files.", "See tidemill top, and receipt for what it used.", "none"),
        example="none",
        limits="none only.",
    ),
    "--propagate": noted("Limits of the shell that tidemill is called in are not taken along.", example="NONE"),
    "--qos": maps(
        "priority, slurm.qos",
        _qos,
        example="normal",
        note="low, normal and high are priorities; any other is told to sites with Slurm.",
    ),
    "--quiet": noted(_SUBMITTING, example=""),
    "--reboot": refused("Machines are not rebooted for a job.", "Leave it out.", example=""),
    "--requeue": maps("retry", _requeue, example=""),
    "--reservation": maps("reservation", _reservation, example="night"),
    "--resv-ports": refused(
        "Ports are not kept for srun.", "One is: MASTER_PORT; others are named in a Tidemill spec: ports.", example=""
    ),
    "--segment": refused(
        "Gangs are not cut into segments.", "Write placement.within or prefer in a Tidemill spec.", example="4"
    ),
    "--signal": maps(
        "checkpoint.grace", _signal, example="TERM@120", limits="TERM only; it is sent that long before --time ends."
    ),
    "--sockets-per-node": refused(_SHAPE_OF_MACHINE, _ASK_CORES, example="2"),
    "--spread-job": noted(
        "Where workers are put is for the scheduler to say; placement.spread keeps them apart.", example=""
    ),
    "--stepmgr": noted("Steps are commands of a worker.", example=""),
    "--switches": maps("placement.prefer: rack", _switches, example="1@10:00", limits="1 only."),
    "--test-only": refused(_CALL_ONLY, "Call tidemill quote FILE.", example=""),
    "--thread-spec": noted("What the system needs of a machine is kept by its settings.", example="1"),
    "--threads-per-core": noted(_BINDING, example="1"),
    "--time": maps("max_duration", _time, example="1-12:00:00"),
    "--time-min": maps("", _seconds_least, example="10:00"),
    "--tmp": maps("resources.disk", _disk, example="10G"),
    "--tres-bind": noted(_BINDING, example="gres/gpu:closest"),
    "--tres-per-task": refused(
        "Resources of a task are asked for one by one.", "Write --cpus-per-task and --gpus-per-task.", example="cpu=4"
    ),
    "--uid": refused("A worker has the user that its machine gives it.", "Leave it out.", example="me"),
    "--usage": refused(_CALL_ONLY, "Take it out.", example=""),
    "--use-min-nodes": noted("A range of nodes is filled as there is room.", example=""),
    "--verbose": noted(_SUBMITTING, example=""),
    "--version": refused(_CALL_ONLY, "Take it out.", example=""),
    "--wait": noted(_SUBMITTING, example=""),
    "--wait-all-nodes": noted("All workers start together in any case.", example="1"),
    "--wckey": maps("labels.wckey", _label("wckey"), example="project1"),
    "--wrap": refused(
        "A script has its commands in itself.", "Write the command below the options.", example="hostname"
    ),
    "hetjob": refused(
        "Parts of a job that differ are workloads of their own.",
        "Submit a workload for each, with group for what starts together.",
        example="",
    ),
    "packjob": refused(
        "Parts of a job that differ are workloads of their own.",
        "Submit a workload for each, with group for what starts together.",
        example="",
    ),
}
