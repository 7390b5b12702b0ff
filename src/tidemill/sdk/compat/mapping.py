"""What the readers of other tools' files share: rules for fields, and what became of each field of a file.

A tool's fields are a table of rules, in the tool's own words. ``walk`` goes over the file, not over the table, and
makes an entry for whatever it meets: mapped, noted, or refused by name. A rule that sets something says in words what
the field became, so nothing can be read and not be told of; what has no rule is refused.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

from tidemill.errors import InvalidSpec
from tidemill.wire.checks import Refusal, name_of
from tidemill.wire.fields import mount_of


class Tool(StrEnum):
    """Whose file it is."""

    TIDEMILL = "tidemill"
    SKYPILOT = "skypilot"
    DSTACK = "dstack"
    SLURM = "slurm"


TITLES: Final = {
    Tool.TIDEMILL: "a Tidemill spec",
    Tool.SKYPILOT: "a SkyPilot task file",
    Tool.DSTACK: "a dstack configuration",
    Tool.SLURM: "an sbatch script",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapped:
    """A field and what it became; ``becomes`` empty: noted, because leaving it out cannot change results.

    ``line`` is where it is in the file; zero: it is not there, and what is told is the tool's default.
    """

    field: str
    value: str
    becomes: str = ""
    note: str = ""
    line: int = 0

    @property
    def is_noted(self) -> bool:
        """Whether nothing was set for it."""
        return not self.becomes


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """A field without an exact equivalent: why, and what comes nearest."""

    field: str
    value: str
    reason: str
    instead: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Surroundings:
    """What a tool takes from where it is called: values of variables, the instant, and the file's own name.

    ``given`` are variables set on the command line. ``now_ns`` is the instant; ``offset_s`` how far local time is
    ahead of UTC.
    """

    source: str = "the file"
    given: Mapping[str, str] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    now_ns: int = 0
    offset_s: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Translation:
    """A file of another tool as a Tidemill spec.

    ``spec`` is as its YAML would have it. ``lines`` has the line, in that file, behind each field of the spec, and
    ``origins`` the name of the field there. ``folder`` is what relative paths of the spec count from.
    """

    tool: Tool
    source: str
    spec: dict[str, Any]
    mapped: tuple[Mapped, ...]
    refused: tuple[Refused, ...]
    lines: dict[str, int]
    origins: dict[str, str]
    folder: Path

    def checked(self) -> Translation:
        """The same, with what the control plane would not accept of the spec among the refusals."""
        from tidemill.wire import read_spec

        if self.refused:
            return self
        try:
            read_spec({name: value for name, value in self.spec.items() if name != "workdir"}, "unnamed")
        except InvalidSpec as error:
            alone = {"field": error.field, "value": error.value, "detail": error.detail, "mend": error.mend}
            return replace(self, refused=tuple(map(self._refused, error.data.get("errors") or [alone])))
        return self

    def _refused(self, problem: Mapping[str, Any]) -> Refused:
        name = str(problem["field"])
        while name and name not in self.origins:
            name = name.rpartition(".")[0]
        return Refused(
            field=self.origins.get(name) or str(problem["field"]),
            value=shown(problem["value"]),
            reason=str(problem["detail"]),
            instead=str(problem["mend"]),
            line=self.lines.get(name, 0),
        )

    def error(self) -> InvalidSpec:
        """All refusals as one error, the first of them speaking."""
        problems = [
            {"field": one.field, "value": None, "detail": one.reason, "mend": one.instead, "line": one.line}
            for one in self.refused
        ]
        first = self.refused[0]
        return InvalidSpec(first.reason, field=first.field, mend=first.instead, errors=problems, source=self.source)


class Refuse(Exception):
    """What a rule raises for a value that has no equivalent."""

    def __init__(self, reason: str, instead: str = "") -> None:
        self.reason = reason
        self.instead = instead
        super().__init__(reason)


@dataclass(frozen=True, slots=True)
class Said:
    """What a field became, with a note that is for this value only."""

    becomes: str
    note: str = ""


class Draft:
    """A spec in the making, and the entries of what became of each field; ``reading`` is the one that is being read."""

    def __init__(self, surroundings: Surroundings, lines: Mapping[str, int], given: Mapping[str, Any]) -> None:
        self.surroundings = surroundings
        self.given = given
        self.spec: dict[str, Any] = {}
        self.lines: dict[str, int] = {}
        self.origins: dict[str, str] = {}
        self.mapped: list[Mapped] = []
        self.refused: list[Refused] = []
        self.before_run: list[str] = []
        self._foreign = lines
        self.reading = ""

    def beside(self) -> Draft:
        """An empty draft of the same file, for a part of it."""
        return Draft(self.surroundings, self._foreign, self.given)

    def put(self, name: str, value: Any) -> str:
        """Set a field of the spec (``resources.gpus``); the words for it: ``resources.gpus: H100:8``."""
        *sections, last = name.split(".")
        target = self.spec
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
        self.trace(name)
        return f"{name}: {shown(value)}"

    def trace(self, name: str) -> None:
        """Remember that a field of the spec comes from the foreign field that is being read; nothing beside one."""
        if not self.reading:
            return
        self.lines.setdefault(name, self.line_of(self.reading))
        self.origins.setdefault(name, self.reading)

    def get(self, name: str, default: Any = None) -> Any:
        """A field of the spec as it stands."""
        value: Any = self.spec
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def line_of(self, name: str) -> int:
        """The line of a field of the foreign file, or of the nearest one around it; zero when none is known."""
        parts = name.replace("[", ".").replace("]", "").split(".")
        while parts:
            if line := self._foreign.get(".".join(parts)):
                return line
            parts.pop()
        return 0

    def tell(self, name: str, value: Any, becomes: str = "", note: str = "", *, line: int = 0) -> None:
        """Make an entry for a field that is in the file; ``line`` zero: where its name is."""
        line = line or self.line_of(name)
        self.mapped.append(Mapped(field=name, value=shown(value), becomes=becomes, note=note, line=line))

    def default(self, name: str, becomes: str, note: str) -> None:
        """Make an entry for a field that is not in the file, where the tool's default is not ours."""
        self.mapped.append(Mapped(field=name, value="(not given)", becomes=becomes, note=note))

    def refuse(self, name: str, value: Any, reason: str, instead: str = "", *, line: int = 0) -> None:
        """Make an entry for a field that has no equivalent."""
        line = line or self.line_of(name)
        self.refused.append(Refused(field=name, value=shown(value), reason=reason, instead=instead, line=line))

    def apply(self, name: str, value: Any, take: Taker, note: str = "", *, is_hidden: bool = False) -> None:
        """Have a rule take the field, and make the entry of what it says."""
        self.reading = name
        seen = HIDDEN if is_hidden or _PRIVATE.search(name) else value
        try:
            said = take(self, name, value)
        except Refuse as refusal:
            self.refuse(name, seen, refusal.reason, refusal.instead)
            return
        finally:
            self.reading = ""
        if isinstance(said, str):
            said = Said(said)
        self.tell(name, seen, said.becomes, said.note or note)


Taker = Callable[[Any, str, Any], str | Said]
"""Sets fields of the draft's spec and says what the foreign field became. Raises: Refuse."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What becomes of a field. ``becomes`` and ``note`` are for the reference; ``take`` does it.

    Neither ``take`` nor ``below`` nor ``instead``: noted. ``instead`` alone: refused always. ``below``: a section.
    ``limits`` says which values are taken, for the reference. ``example`` is a value that the tool documents.
    ``is_hidden``: values stay out of what is shown.
    """

    becomes: str = ""
    note: str = ""
    limits: str = ""
    instead: str = ""
    take: Taker | None = None
    below: Mapping[str, Rule] | None = None
    example: Any = None
    takes_null: bool = False
    is_hidden: bool = False

    @property
    def treatment(self) -> str:
        """How the reference calls it."""
        if self.take is not None:
            return "mapped"
        if self.below is not None and not self.note:
            return "section"
        return "refused" if self.instead else "noted"


def maps(
    becomes: str,
    take: Taker,
    *,
    example: Any,
    note: str = "",
    limits: str = "",
    below: Mapping[str, Rule] | None = None,
    takes_null: bool = False,
) -> Rule:
    """A field that is mapped; with ``below``, a mapping in its place is a section."""
    return Rule(
        becomes=becomes, take=take, note=note, limits=limits, below=below, example=example, takes_null=takes_null
    )


def noted(reason: str, *, example: Any) -> Rule:
    """A field that is told of and left out, because that cannot change results."""
    return Rule(note=reason, example=example)


def refused(reason: str, instead: str, *, example: Any, is_hidden: bool = False) -> Rule:
    """A field that has no equivalent."""
    return Rule(note=reason, instead=instead, example=example, is_hidden=is_hidden)


def section(below: Mapping[str, Rule]) -> Rule:
    """A field with fields in it."""
    return Rule(below=below)


ANY: Final = "*"
"""In a table: a field of any name."""


def walk(draft: Draft, rules: Mapping[str, Rule], given: Mapping[str, Any], prefix: str = "") -> None:
    """Make an entry for everything in ``given``, by the rules."""
    for key, value in given.items():
        name = f"{prefix}{key}"
        rule = rules.get(key) or rules.get(ANY)
        if rule is None:
            near = difflib.get_close_matches(str(key), list(rules), 1)
            hint = f"Did you mean {prefix}{near[0]}?" if near else "Take it out."
            draft.refuse(name, value, "It is not a field that is documented for this tool.", hint)
        elif value is None and not rule.takes_null:
            draft.tell(name, value, note="It is empty, as if it were left out.")
        elif rule.below is not None and isinstance(value, dict):
            if not value:
                draft.tell(name, value, note="There is nothing in it.")
            walk(draft, rule.below, value, f"{name}.")
        elif rule.take is not None:
            draft.apply(name, value, rule.take, rule.note, is_hidden=rule.is_hidden and value is not None)
        elif rule.instead:
            draft.refuse(name, HIDDEN if rule.is_hidden else value, rule.note, rule.instead)
        elif rule.treatment == "section":
            known = ", ".join(name for name in rule.below or () if name != ANY)
            draft.refuse(name, value, "It needs to be a section.", f"Its fields are {known}." if known else "")
        else:
            draft.tell(name, value, note=rule.note)


def leaves(rules: Mapping[str, Rule], prefix: str = "") -> Iterator[tuple[str, Rule]]:
    """Every field of a table with its whole name, sections before what is in them; ``*`` stands for any name."""
    for name, rule in rules.items():
        if rule.treatment != "section":
            yield f"{prefix}{name}", rule
        if rule.below is not None:
            yield from leaves(rule.below, f"{prefix}{name}.")


class Hidden:
    """Stands for a value that is not to be shown."""

    def __repr__(self) -> str:
        return "(hidden)"


HIDDEN: Final = Hidden()
_LONGEST: Final = 120
_PRIVATE: Final = re.compile(r"PASSWORD|SECRET|(?<!MAX_)TOKEN(?!S|I)")


def shown(value: Any) -> str:
    """A value in a few words, on one line."""
    if isinstance(value, str):
        lines = value.strip().splitlines() or [""]
        text = lines[0] + (f" … ({len(lines)} lines)" if len(lines) > 1 else "")
    elif isinstance(value, Hidden):
        text = repr(value)
    else:
        text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


# --- values that several tools have ---

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?)B?", re.IGNORECASE)
_MODEL_MEMORY: Final = re.compile(r"(.+?)[-_](\d+)GB", re.IGNORECASE)


def size_text(value: Any, *, unit: str = "GB") -> str:
    """A size as Tidemill writes it; a bare number is in ``unit``. Raises: Refuse."""
    match = None if isinstance(value, bool) else _SIZE.fullmatch(str(value).strip())
    if match is None:
        raise Refuse(f"{shown(value)} is not a size.", "Write for example 16GB.")
    number, letter = match[1], match[2].upper()
    return f"{number}{letter}B" if letter else f"{number}{unit}"


def number(value: Any, what: str, *, low: float = 0, high: float = 1e9) -> int:
    """A whole number, also when it is written as text. Raises: Refuse."""
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise Refuse(f"{shown(value)} is not {what}.", f"Write a whole number from {low:g} to {high:g}.")
    return value


def flag(value: Any) -> bool:
    """True or false. Raises: Refuse."""
    if type(value) is not bool:
        raise Refuse(f"{shown(value)} is neither true nor false.", "Write true or false.")
    return value


def text(value: Any) -> str:
    """Text; numbers are taken for it. Raises: Refuse."""
    if type(value) is str:
        return value
    if type(value) in (int, float):
        return str(value)
    raise Refuse(f"{shown(value)} is not text.", "Write it as text.")


def gpu_request(model: str, count: Any) -> str:
    """A request such as ``A100:80GB:8`` for a name such as ``A100-80GB``. Raises: Refuse for what is no GPU."""
    from tidemill import catalog
    from tidemill.model.resources import parse_gpus

    name = model.strip()
    if name.lower().startswith("tpu"):
        raise Refuse(f"{name} is a TPU, for which there is no engine.", "Ask for GPUs: resources.gpus.")
    wanted = f"{name}:{count}"
    if not catalog.known_model(name):
        match = _MODEL_MEMORY.fullmatch(name)
        if match is None or not catalog.known_model(match[1]):
            near = ", ".join(catalog.nearest_names(name)[:3])
            raise Refuse(f"There is no GPU called {name}.", f"Did you mean {near}?" if near else "")
        wanted = f"{match[1]}:{match[2]}GB:{count}"
    try:
        request = parse_gpus(wanted)
    except ValueError as error:
        raise Refuse(f"{wanted} cannot be asked for: {error}.", "Write for example H100:8.") from error
    return wanted if request is not None else "none"


_LABEL_KEY: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_./]{0,61}[A-Za-z0-9])?", re.ASCII)


def label(draft: Draft, name: str, value: Any) -> str:
    """Put one of the workload's labels. Raises: Refuse for a name or value that labels cannot have."""
    if not _LABEL_KEY.fullmatch(name) or len(text(value)) > 256:
        raise Refuse(
            f"{shown(name)} cannot be a label here.",
            "Labels have letters, digits, - _ . or / and up to 256 characters.",
        )
    draft.spec.setdefault("labels", {})[name] = text(value)
    draft.trace(f"labels.{name}")
    return f"labels.{name}: {text(value)}"


def place(draft: Draft, name: str, value: str) -> str:
    """Put a label that machines need to have."""
    draft.spec.setdefault("placement", {}).setdefault("labels", {})[name] = value
    draft.trace(f"placement.labels.{name}")
    return f"placement.labels.{name}: {value}"


def volume(draft: Draft, name: Any, at: Any) -> str:
    """Have a volume of that name mounted at a path. Raises: Refuse."""
    if not isinstance(name, str) or not isinstance(at, str):
        raise Refuse(f"{shown(name)} is not the name of one volume.", "Name one: tidemill volume list.")
    try:
        mount = {"name": name_of(name), "at": mount_of(at)}
    except Refusal as refusal:
        context = refusal.context or {}
        raise Refuse(str(context["detail"]), str(context["mend"])) from refusal
    draft.spec.setdefault("volumes", []).append(mount)
    draft.trace("volumes")
    return f"volumes: {{name: {name}, at: {at}}}"


def name_text(value: Any) -> Said:
    """A workload's name: as it is, or with what names cannot have replaced."""
    given = text(value)
    kept = "".join(letter if letter.isascii() and (letter.isalnum() or letter in "-_.") else "-" for letter in given)
    name = kept.strip("-_.")[:63].strip("-_.")
    if not name:
        raise Refuse(f"{shown(value)} is not a name.", "Use letters, digits, - _ or .")
    return Said(name, "" if name == given else "Names have letters, digits, - _ and . only, and up to 63 of them.")


def port_number(value: Any) -> int:
    """A port. Raises: Refuse."""
    port = number(value, "a port", low=1, high=65_535)
    if port < 1024:
        raise Refuse(f"{port} is a port that only administrators listen on.", "Use a port from 1024 up.")
    return port


AS_BASH: Final = 'set +eu; [ -z "${BASH_VERSION:-}" ] || set +o pipefail'
"""Our scripts end at the first command that fails, or variable that is not set; those of other tools go on."""
_PIP: Final = re.compile(r"\bpip3?\b")
_OWN_PYTHON: Final = (
    'own="$TIDEMILL_SCRATCH_DIR/python"\n[ -d "$own" ] || python3 -m venv --system-site-packages "$own" || exit\n'
    '. "$own/bin/activate"'
)


def own_python(draft: Draft) -> list[str]:
    """Lines before scripts that call pip: elsewhere it changes a machine, here they get an environment of theirs.

    In an image the scripts have that image to change, and there are no such lines.
    """
    scripts = f"{draft.get('setup', '')}\n{draft.get('run', '')}"
    if draft.get("image") or not _PIP.search(scripts):
        return []
    note = (
        "pip installs there, anew on each attempt; what env.packages of a Tidemill spec names is built once and kept."
    )
    draft.default("pip", "run: a Python environment of the worker", note)
    return [_OWN_PYTHON]
