"""The generated reference is what the code says, and nothing that has a name is left out."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

from tests.docs.pages import ROOT


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tidemill_docs_generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


generate: Any = _generator()


def _page(name: str) -> str:
    return (ROOT / "docs" / "reference" / f"{name}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(generate.PAGES))
def test_page_is_up_to_date(name: str) -> None:
    assert _page(name) == generate.page(name), "run make docs"


def test_every_command_and_option_is_on_the_page() -> None:
    page = _page("cli")
    for name, command in generate.commands():
        assert f"## {name}\n" in page
        for parameter in command.params:
            assert parameter.name == "help" or f"| {generate.option(parameter)[0]} |" in page, (
                f"{name} {parameter.name}"
            )


def test_every_route_is_on_the_page() -> None:
    page = _page("rest")
    found = generate.routes()
    assert len(found) > 20
    for method, path, operation in found:
        assert f"### {method} {path}\n" in page
        assert operation.get("summary") or operation.get("description"), f"{method} {path} says nothing of itself"


def test_every_event_reason_error_setting_variable_and_metric_is_on_its_page() -> None:
    from dataclasses import fields

    from tidemill.control.settings import Settings

    wanted = {
        "events": generate.event_names(),
        "reasons": generate.reason_codes(),
        "errors": [kind.code for kind in generate.error_kinds()],
        "settings": {item.name for item in fields(Settings)} - {"home"},
        "metrics": generate.metric_lines(),
    }
    for page, names in wanted.items():
        assert names
        for name in names:
            assert f"`{name}`" in _page(page), f"{name} is not on {page}"
    both = _page("settings") + _page("spec")
    assert all(f"`{name}`" in both for name in generate.environment_names())


def test_a_name_without_a_meaning_is_found() -> None:
    known = generate.meanings()["events"]
    with pytest.raises(generate.Undocumented, match="Planted"):
        generate.explained("events", [*known, "Planted"])
    with pytest.raises(generate.Undocumented, match="Submitted"):
        generate.explained("events", [name for name in known if name != "Submitted"])


def test_scanning_the_code_finds_what_is_known_to_be_there() -> None:
    assert {"Submitted", "Placed", "Succeeded", "Failed", "Cancelled"} <= generate.event_names().keys()
    assert {"NotEnoughFreeGpus", "NoNodeWithGpu", "QueueLimit"} <= generate.reason_codes()
    assert {"TIDEMILL_HOME", "TIDEMILL_TOKEN"} <= generate.environment_names()
