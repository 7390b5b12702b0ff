"""Workload files: what is wrong is shown with its line, and YAML's traps are closed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.errors import InvalidSpec, NotFound, TidemillError, TooLarge
from tidemill.sdk.specfile import load, parse


def read(text: str | bytes):
    octets = text.encode() if isinstance(text, str) else text
    return parse(octets, source="w.yaml", folder=Path())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: 1\nb: [1, 2\n", "w.yaml:3:1"),
        ("run: x\n\tname: y\n", "w.yaml:2:1"),
        ("run: a\nname: b\nrun: c\n", "w.yaml:3:1: 'run' is given twice; first in line 1"),
        ("env:\n  a: 1\n  a: 2\n", "w.yaml:3:3: 'a' is given twice"),
        ("- run: a\n", "w.yaml:1:1: a workload is a mapping"),
        ("hello\n", "w.yaml:1:1: a workload is a mapping"),
        ("a: 1\n---\nb: 2\n", "w.yaml:2:1"),
        ("? [a]\n: 1\n", "w.yaml:1:3: a name is text"),
        ("a: !!python/object:os.system x\n", "w.yaml:1:4"),
        ("a: *nobody\n", "w.yaml:1:4"),
        ("a: 'open\n", "w.yaml:"),
        ("", "w.yaml is empty"),
        ("# only a comment\n", "w.yaml is empty"),
        (b"\xff\xfe\x00run", "not a text file"),
        (b"run: \x00", "not a text file"),
        ("run: x\nb: a\x07", "w.yaml:2: YAML does not allow"),
        ("a: &a [*a]\n", "repeats parts of itself"),
    ],
)
def test_mistakes_are_shown_where_they_are(text, told):
    with pytest.raises(InvalidSpec) as error:
        read(text)
    assert told in error.value.detail


def test_the_offending_line_is_shown_with_a_mark_below():
    with pytest.raises(InvalidSpec) as error:
        read("name: a\nresources: {gpus: 1\nrun: x\n")
    assert "3 | run: x" in error.value.detail
    assert error.value.detail.splitlines()[-1].strip().endswith("^")


def test_one_alias_inside_another_does_not_blow_up():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(InvalidSpec, match="repeats"):
        read(bomb)


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("retry: {on: [error], max: 2}", {"retry": {"on": ["error"], "max": 2}}),
        ("env: {python: 3.10}", {"env": {"python": "3.10"}}),
        ("envs: {A: 1.10, B: true, C: no, D: 010}", {"envs": {"A": "1.10", "B": "true", "C": "no", "D": "010"}}),
        ("max_duration: 1:30", {"max_duration": "1:30"}),
        ("name: 2026-11-22", {"name": "2026-11-22"}),
        ("priority: 010", {"priority": 10}),
        (
            "a: [1, -2, 1.5, .5, 1e3, true, ~, null, yes, off, 0x1f, 1_000]",
            {"a": [1, -2, 1.5, 0.5, 1000.0, True, None, None, "yes", "off", 31, "1_000"]},
        ),
        ("a: .nan", {"a": ".nan"}),
        ("x: &d {a: 1}\ny: {<<: *d, b: 2}", {"x": {"a": 1}, "y": {"a": 1, "b": 2}}),
        ("\ufeffrun: x", {"run": "x"}),
        ("1: a", {"1": "a"}),
    ],
)
def test_values_are_what_they_look_like(text, spec):
    assert read(text).spec == spec


def test_fields_are_found_in_their_lines():
    found = read("name: a\nresources:\n  gpus: 1\nports:\n  - http\n  - x\n")
    assert [found.line_of(name) for name in ("resources.gpus", "ports.1", "ports[1]", "resources.new", "none")] == [
        3,
        6,
        6,
        2,
        0,
    ]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(NotFound):
        load(tmp_path / "none.yaml")
    with pytest.raises(InvalidSpec, match="folder"):
        load(tmp_path)
    (tmp_path / "big.yaml").write_bytes(b"a" * 1_000_001)
    with pytest.raises(TooLarge):
        load(tmp_path / "big.yaml")


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_octets_are_a_workload_or_an_error_that_says_so(octets):
    try:
        found = parse(octets, source="w", folder=Path())
    except TidemillError:
        return
    assert isinstance(found.spec, dict)
