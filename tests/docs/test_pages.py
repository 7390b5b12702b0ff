"""Every code block of the documentation is run, or read by what would read it.

``console`` blocks are sessions in one folder a page, against a cloud of the page's own: each ``$ `` line has to succeed
and to print what is below it, where ``...`` stands for anything. ``python`` blocks are run. A ``yaml``, ``python`` or
``sh`` block whose first line is ``# name.yaml`` is put into the folder as that file. Workloads are read as the control
plane reads them. The one way out is ``<!-- not run: reason -->`` on the line before a block, and there are few of them.
"""

from __future__ import annotations

import contextlib
import doctest
import json
import os
import re
import socket
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.cloud import free_port
from tests.docs.pages import ROOT, Block, Step, all_pages, anchors_of, blocks_of, links_of, steps_of

MOST_NOT_RUN = 6
TIMEOUT_S = 120
_RUNS = ("console", "python")
_READS = ("yaml", "json", "toml", "text", "mermaid", "sh")
_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_CHECKER = doctest.OutputChecker()
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_SESSION = """
cd "$(cat {state}/cwd)"
[ -f {state}/exports ] && . {state}/exports
{command}
status=$?
export -p > {state}/exports
pwd > {state}/cwd
exit $status
"""


class Reader:
    """Somebody who follows a page, with a folder, a home and a shell of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self._state = folder / "work", folder / "home", folder / "state"
        for made in (self.folder, self.home, self._state):
            made.mkdir()
        self.home.chmod(0o700)
        (self._state / "cwd").write_text(str(self.folder))
        (self.home / "config.yaml").write_text(f"port: {free_port()}\ngateway_port: {free_port()}\n")
        programs = str(Path(sys.executable).parent)
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("TIDEMILL_", "PYTEST_", "COV_"))
        }
        self.environment |= {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "TIDEMILL_HOME": str(self.home),
            "VIRTUAL_ENV": str(Path(programs).parent),
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
            "COLUMNS": "120",
        }

    def run(self, command: str) -> tuple[int, str, str]:
        """Exit status, standard output, and both outputs as a terminal would show them, of a command.

        It finds what earlier ones left. Its outputs are two sockets that send to one, which keeps the order in which
        lines were written as well as where; two pipes would lose it.
        """
        came: list[tuple[bool, bytes]] = []
        with contextlib.ExitStack() as stack:
            ends = [stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) for _ in range(3)]
            for end in ends:
                end.bind("")
            told, output, errors = ends
            output.connect(told.getsockname())
            errors.connect(told.getsockname())
            listener = threading.Thread(target=_listen, args=(told, output.getsockname(), came))
            listener.start()
            process = subprocess.Popen(
                ["bash", "-c", _SESSION.format(state=self._state, command=command)],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output.fileno(),
                stderr=errors.fileno(),
            )
            try:
                status = process.wait(TIMEOUT_S)
            finally:
                process.kill()
                told.sendto(b"", told.getsockname())
                listener.join()
        shown = b"".join(octets for _, octets in came)
        return status, _plain(b"".join(octets for is_output, octets in came if is_output)), _plain(shown)

    def follow(self, block: Block) -> None:
        """Do what the block says. Raises: AssertionError that shows where it is not as the page says."""
        if block.file_name:
            path = self.folder / block.file_name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.body)
        elif block.language == "console":
            for step in steps_of(block):
                self._take(block, step)
        elif block.language == "python":
            status, _, told = self.run(f"python - <<'END_OF_BLOCK'\n{block.body}\nEND_OF_BLOCK")
            assert status == 0, f"{block}: the example fails\n{told}"

    def _take(self, block: Block, step: Step) -> None:
        where = f"{block.page.relative_to(ROOT)}:{step.line}"
        status, output, told = self.run(step.command)
        assert status == 0, f"{where}: $ {step.command}\nended with {status} and said:\n{told}"
        if step.output.strip():
            want = doctest.Example(step.command, step.output + "\n").want
            # a terminal shows both outputs; that something is under way it shows only for a moment
            matches = any(_CHECKER.check_output(want, text, _FLAGS) for text in (output, told))
            assert matches, f"{where}: $ {step.command}\nthe page says:\n{step.output}\nit prints:\n{told}"


def _listen(told: socket.socket, output: object, came: list[tuple[bool, bytes]]) -> None:
    """Take what comes until ``told`` hears from itself."""
    while True:
        octets, sender = told.recvfrom(1 << 20)
        if sender == told.getsockname():
            return
        came.append((sender == output, octets))


def _plain(octets: bytes) -> str:
    return _ANSI.sub("", octets.decode(errors="replace"))


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _is_followed(page: Path) -> bool:
    return any(block.language in _RUNS and not block.not_run and not block.file_name for block in blocks_of(page))


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """A reader whose cloud, if they started one, is ended."""
    folder = tmp_path / "reader"
    folder.mkdir()
    made = Reader(folder)
    yield made
    made.run("tidemill down --timeout 20")


@pytest.mark.parametrize("page", [page for page in all_pages() if _is_followed(page)], ids=_name)
def test_a_reader_who_does_what_the_page_says_sees_what_it_says(page: Path, reader: Reader) -> None:
    blocks = [block for block in blocks_of(page) if not block.not_run]
    first = next(block for block in blocks if block.language in _RUNS and not block.file_name)
    if "$ tidemill up\n" not in first.body:
        status, _, told = reader.run("tidemill up")
        assert status == 0, told
    for block in blocks:
        reader.follow(block)


@pytest.mark.parametrize("page", all_pages(), ids=_name)
def test_every_block_is_of_a_kind_that_is_run_or_read(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in (*_RUNS, *_READS), f"{block}: a block of {block.language or 'no language'}"
        if block.language == "console" and not block.not_run:
            assert list(steps_of(block)), f"{block}: a console block without a command"


@pytest.mark.parametrize("page", all_pages(), ids=_name)
def test_data_in_blocks_is_what_it_claims_to_be(page: Path, tmp_path: Path) -> None:
    for block in blocks_of(page):
        if block.language == "json":
            json.loads(block.body)
        elif block.language == "toml":
            tomllib.loads(block.body)
        elif block.language == "yaml":
            _check_yaml(block, tmp_path)


def _check_yaml(block: Block, folder: Path) -> None:
    from tidemill.control.settings import load_settings
    from tidemill.sdk.compat import parse
    from tidemill.wire import read_spec

    for document in yaml.safe_load_all(block.body):
        assert isinstance(document, dict), f"{block}: a mapping is expected"
        if {"run", "kind", "type"} & document.keys():
            source = block.file_name or str(block)
            spec = parse(block.body.encode(), source=source, folder=folder).accepted().spec
            read_spec({name: value for name, value in spec.items() if name != "workdir"}, "example")
        elif block.file_name.endswith("config.yaml"):
            (folder / "config.yaml").write_text(block.body)
            load_settings(folder, {})


def test_few_blocks_are_not_run_and_each_says_why() -> None:
    excused = [block for page in all_pages() for block in blocks_of(page) if block.not_run]
    assert len(excused) <= MOST_NOT_RUN, [str(block) for block in excused]
    assert all(len(block.not_run) >= 10 for block in excused)


@pytest.mark.parametrize("page", all_pages(), ids=_name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links_of(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{_name(page)}: {target}"
        if anchor and there.suffix == ".md":
            assert anchor in anchors_of(there), f"{_name(page)}: {target}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md" or not page.exists():
            continue
        reached.add(page)
        waiting += [(page.parent / link.partition("#")[0]).resolve() for link in links_of(page) if ":" not in link]
    assert set(all_pages()) <= reached, sorted(map(_name, set(all_pages()) - reached))


def test_planted_mistakes_are_found(reader: Reader, tmp_path: Path) -> None:
    def block(language: str, body: str) -> Block:
        return Block(ROOT / "README.md", 1, language, body, "")

    reader.follow(block("console", "$ echo one two\none ...\n"))
    reader.follow(block("console", "$ echo one; echo two >&2; echo three\none\ntwo\nthree\n"))
    with pytest.raises(AssertionError, match="the page says"):
        reader.follow(block("console", "$ echo one\ntwo\n"))
    with pytest.raises(AssertionError, match="ended with 3"):
        reader.follow(block("console", "$ (exit 3)\n"))
    with pytest.raises(AssertionError, match="the example fails"):
        reader.follow(block("python", "raise SystemExit(1)\n"))
    with pytest.raises(Exception, match="memroy"):
        _check_yaml(block("yaml", "kind: task\nrun: x\nresources: {memroy: 1GB}\n"), tmp_path)
