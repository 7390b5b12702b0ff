"""Whose file it is, and its reading."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tidemill.errors import InvalidRequest, InvalidSpec, TooLarge
from tidemill.sdk import specfile
from tidemill.sdk.compat import skypilot
from tidemill.sdk.compat.mapping import TITLES, Draft, Mapped, Refused, Rule, Surroundings, Tool, Translation
from tidemill.sdk.specfile import SpecFile

_DIRECTIVE: Final = re.compile(rb"^#SBATCH\b", re.MULTILINE)
_BETWEEN: Final = re.compile(rb"^---(?:\s.*)?$", re.MULTILINE)
_OURS: Final = frozenset(
    (
        "kind",
        "project",
        "nodes",
        "env",
        "image",
        "array",
        "max_duration",
        "retry",
        "checkpoint",
        "expected_duration",
        "start_after",
        "start_before",
        "after",
        "group",
        "placement",
        "capacity",
        "spot",
        "reservation",
        "priority",
        "labels",
        "ports",
    )
)
_OUR_RESOURCES: Final = frozenset(("gpus", "disk", "prefer"))
_OUR_SERVICE: Final = frozenset(("port", "readiness", "model", "concurrency", "wait", "idle"))
_SHARED: Final = frozenset(("name", "workdir", "setup", "run", "envs", "resources", "secrets", "service", "inputs"))
_COMMON_WORDS: Final = frozenset(("outputs", "config", "pool"))
"""Alone they do not tell whose file it is: anybody may write them by mistake."""
_SHARED_RESOURCES: Final = frozenset(("cpus", "memory", "any_of"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A workload file, whoever's it is.

    ``file`` has the Tidemill spec and the line, in the file as it is, behind its fields. ``translation`` is None
    when the file is Tidemill's own. ``doubt`` says what else it could have been; empty: nothing.
    """

    tool: Tool
    file: SpecFile
    translation: Translation | None = None
    doubt: str = ""

    @property
    def title(self) -> str:
        """What it was read as."""
        return TITLES[self.tool]

    def accepted(self) -> SpecFile:
        """The file, when nothing in it was refused. Raises: InvalidSpec with every refusal and its line."""
        if self.translation is not None and self.translation.refused:
            raise self.translation.error()
        return self.file


def load(path: Path, *, tool: Tool | None = None, surroundings: Surroundings | None = None) -> Reading:
    """The workload in a file; ``tool`` None: whose it looks to be. Raises: as ``specfile.load``."""
    octets = specfile.octets_of(path)
    return parse(octets, source=str(path), folder=path.parent, tool=tool, surroundings=surroundings)


def parse(
    octets: bytes,
    *,
    source: str,
    folder: Path,
    tool: Tool | None = None,
    surroundings: Surroundings | None = None,
) -> Reading:
    """The workload in the octets of a file. Raises: as ``load``."""
    around = surroundings or Surroundings(source=source)
    if tool is Tool.SLURM or (tool is None and is_batch_script(octets)):
        if len(octets) > specfile.MAX_BYTES:
            raise TooLarge(f"{source} has {len(octets)} bytes; a script has at most {specfile.MAX_BYTES}")
        try:
            script = octets.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise InvalidSpec(f"{source} is not a text file (UTF-8)") from error
        if "\0" in script:
            raise InvalidSpec(f"{source} is not a text file: it holds NUL octets")
        from tidemill.sdk.compat import sbatch  # each tool is imported when a file is its

        return _translated(Tool.SLURM, sbatch.read(script, around), source, Path())
    parts = _documents(octets)
    first = specfile.parse(parts[0] if len(parts) > 1 else octets, source=source, folder=folder)
    found, doubt = (tool, "") if tool is not None else tool_of(first.spec, Path(source).name)
    if found is Tool.TIDEMILL:
        own = first if len(parts) == 1 else specfile.parse(octets, source=source, folder=folder)
        return Reading(tool=found, file=own, doubt=doubt)
    draft = Draft(around, first.lines, first.spec)
    if found is Tool.DSTACK:
        from tidemill.sdk.compat import dstack

        dstack.read(draft, first.spec)
    elif found is Tool.SKYPILOT:
        skypilot.read(draft, first.spec)
    else:
        raise InvalidRequest("is not a tool whose files are read", field="--from", value=str(found))
    _refuse_documents(draft, parts)
    # SkyPilot's paths count from where it is called, dstack's from the file
    return _translated(found, draft, source, folder if found is Tool.DSTACK else Path())


def is_batch_script(octets: bytes) -> bool:
    """Whether it is a script with ``#SBATCH`` lines."""
    return octets.startswith(b"#!") and _DIRECTIVE.search(octets) is not None


def tool_of(spec: Mapping[str, Any], file_name: str = "") -> tuple[Tool, str]:
    """Whose fields these are, and what is doubtful about it."""
    if "type" in spec or file_name.endswith((".dstack.yml", ".dstack.yaml")):
        return Tool.DSTACK, ""
    resources, service = _section(spec, "resources"), _section(spec, "service")
    foreign = _named(spec, skypilot.FIELDS, _SHARED | _COMMON_WORDS, "")
    foreign += _named(resources, skypilot.FIELDS["resources"].below or {}, _SHARED_RESOURCES, "resources.")
    foreign += _named(service, skypilot.FIELDS["service"].below or {}, frozenset(("replicas",)), "service.")
    foreign += ["secrets"] if isinstance(spec.get("secrets"), dict) else []
    foreign += [f"resources.{name}" for name in ("cpus", "memory") if str(resources.get(name)).endswith("+")]
    own = sorted(_OURS & spec.keys()) + [f"resources.{name}" for name in sorted(_OUR_RESOURCES & resources.keys())]
    own += [f"service.{name}" for name in sorted(_OUR_SERVICE & service.keys())]
    if foreign and own:
        return Tool.TIDEMILL, f"it has {own[0]}, which is Tidemill's, and {foreign[0]}, which is SkyPilot's"
    if foreign:
        return Tool.SKYPILOT, ""
    if not own and type(resources.get("memory")) in (int, float):
        return Tool.TIDEMILL, "resources.memory is a number, which is bytes for Tidemill and GB for SkyPilot"
    return Tool.TIDEMILL, ""


def tables() -> dict[Tool, Mapping[str, Rule]]:
    """The fields of each tool."""
    from tidemill.sdk.compat import dstack, sbatch

    return {Tool.SKYPILOT: skypilot.FIELDS, Tool.DSTACK: dstack.FIELDS, Tool.SLURM: sbatch.FIELDS}


def _section(spec: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = spec.get(name)
    return section if isinstance(section, dict) else {}


def _named(given: Any, rules: Mapping[str, Rule], shared: frozenset[str], prefix: str) -> list[str]:
    return [f"{prefix}{name}" for name in given or () if name in rules and name not in shared]


def _documents(octets: bytes) -> list[bytes]:
    """The YAML documents of a file; one when there are no lines of three dashes between them."""
    parts = [part for part in _BETWEEN.split(octets) if re.sub(rb"#.*", b"", part).strip()]
    return parts or [octets]


def _refuse_documents(draft: Draft, parts: list[bytes]) -> None:
    for index in range(1, len(parts)):
        draft.refuse(
            f"document {index + 1}",
            parts[index].decode(errors="replace"),
            "A file has one workload; several documents are a pipeline.",
            "Put each into a file of its own, with after: [NAME] (run --after NAME) for what has to end before.",
        )


def _translated(tool: Tool, draft: Draft, source: str, folder: Path) -> Reading:
    translation = Translation(
        tool=tool,
        source=source,
        spec=draft.spec,
        mapped=tuple(sorted(draft.mapped, key=_line_of)),
        refused=tuple(sorted(draft.refused, key=_line_of)),
        lines=draft.lines,
        origins=draft.origins,
        folder=folder,
    )
    return Reading(tool=tool, file=SpecFile(draft.spec, source, folder, draft.lines), translation=translation)


def _line_of(entry: Mapped | Refused) -> float:
    """Where the entry is in the file; defaults come last."""
    return entry.line or float("inf")
