"""The JSON Schema of workload files, and the table of their fields for the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from tidemill.wire.reading import SECTIONS
from tidemill.wire.section import fields_of
from tidemill.wire.workload import WorkloadSpecIn


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a workload file, for editors."""
    schema = WorkloadSpecIn.model_json_schema(ref_template="#/$defs/{model}")
    definitions = schema.pop("$defs")
    short = {"array": "integer", "retry": "integer"}
    for name, plain in short.items():
        schema["properties"][name] = _or_plain(schema["properties"][name], plain)
    readiness = definitions["ServiceIn"]["properties"]
    readiness["readiness"] = _or_plain(readiness["readiness"], "string")
    readiness["liveness"] = _or_plain(readiness["liveness"], "string")
    rollout = definitions["RolloutIn"]["properties"]
    rollout["rollback"] = _or_plain(rollout["rollback"], "boolean")
    steps = rollout["canary"]
    steps["items"] = _or_plain(steps["items"], "string", "integer")
    one = {key: value for key, value in steps.items() if key not in ("default", "description")}
    kept = {key: value for key, value in steps.items() if key in ("default", "description")}
    rollout["canary"] = {"anyOf": [one, {"type": ["string", "integer"]}, steps["items"]], **kept}
    for place, section in SECTIONS.items():
        described = definitions[section.__name__] if place else schema
        for name, field in fields_of(section).items():
            described["properties"][name].setdefault("description", field.description)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": "https://tidemill.dev/schemas/workload.json",
        **schema,
        "title": "Tidemill workload",
        "examples": [{"name": "hello", "run": "echo hello", "resources": {"gpus": "none", "cpus": 1}}],
        "$defs": definitions,
    }


def _or_plain(field: Mapping[str, Any], *plain: str) -> dict[str, Any]:
    kept = {key: value for key, value in field.items() if key in ("default", "description")}
    choices = field.get("anyOf") or [{"$ref": field["$ref"]}]
    return {"anyOf": [*choices, *({"type": one} for one in plain)], **kept}


def spec_reference_markdown() -> str:
    """The table of every field of a workload file, for the documentation."""
    rows = ["| Field | Default | What it says |", "| --- | --- | --- |"]
    for place, section in SECTIONS.items():
        for name, field in fields_of(section).items():
            path = (*place, name)
            extra = field.json_schema_extra
            default = extra.get("default") if isinstance(extra, dict) and "default" in extra else field.default
            is_plain = type(default) in (str, int, list) and default != ""
            shown = f"`{default}`" if is_plain else ""
            told = f"{field.description}{_examples(section, name)}".replace("|", "\\|")
            rows.append(f"| `{'.'.join(path)}` | {shown} | {told} |")
    return "\n".join(rows) + "\n"


def _examples(section: type[BaseModel], name: str) -> str:
    examples = section.model_json_schema()["properties"][name].get("examples")
    if not examples:
        return ""
    first = examples[0] if len(examples) == 1 else examples
    items = [str(item) for item in (first if type(first) is list else [first])]
    return " For example " + ", ".join(f"`{item}`" for item in items) + "."
