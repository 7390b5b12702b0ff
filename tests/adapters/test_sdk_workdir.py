"""Packing a folder: the same content gives the same archive, and only what belongs in it."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import pytest

from tidemill.errors import InvalidRequest, NotFound, TooLarge
from tidemill.sdk.workdir import pack, scan


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def names(root: Path) -> list[str]:
    return [entry.name for entry in scan(root) if not (root / entry.name).is_dir() or (root / entry.name).is_symlink()]


@pytest.mark.parametrize(
    ("files", "kept"),
    [
        ({"a.py": "", "b/c.py": ""}, ["a.py", "b/c.py"]),
        ({".git/config": "", ".venv/x": "", "__pycache__/m.pyc": "", "a": ""}, ["a"]),
        ({"sub/.git": "gitdir: elsewhere", "sub/a": ""}, ["sub/a"]),
        ({".gitignore": "*.bin\n", "a.bin": "", "d/b.bin": "", "c": ""}, [".gitignore", "c"]),
        ({".gitignore": "*.bin\n!keep.bin\n", "a.bin": "", "keep.bin": ""}, [".gitignore", "keep.bin"]),
        ({".gitignore": "/data\n", "data/x": "", "d/data/x": ""}, [".gitignore", "d/data/x"]),
        ({".gitignore": "data/\n", "data/x": "", "d/data": "a file"}, [".gitignore", "d/data"]),
        ({".gitignore": "data/\n!data/x\n", "data/x": ""}, [".gitignore"]),
        (
            {".gitignore": "*.log\n", "d/.gitignore": "!a.log\n", "d/a.log": "", "b.log": ""},
            [".gitignore", "d/.gitignore", "d/a.log"],
        ),
        ({"d/.gitignore": "/x\n", "d/x": "", "x": ""}, ["d/.gitignore", "x"]),
        (
            {".gitignore": "*.pt\n", ".tidemillignore": "!base.pt\nnotes\n", "base.pt": "", "o.pt": "", "notes": ""},
            [".gitignore", ".tidemillignore", "base.pt"],
        ),
        ({".gitignore": "# only\n\n   \n\\#x\n", "#x": "", "y": ""}, [".gitignore", "y"]),
        ({".gitignore": "**/tmp/*\n", "a/tmp/x": "", "a/y": ""}, [".gitignore", "a/y"]),
    ],
)
def test_what_git_would_ignore_stays_here(tmp_path, files, kept):
    assert names(tree(tmp_path, files)) == kept


def test_the_rules_of_the_repository_around_hold(tmp_path):
    tree(tmp_path, {".git/HEAD": "", ".gitignore": "*.ckpt\n", "job/a.py": "", "job/b.ckpt": ""})
    assert names(tmp_path / "job") == ["a.py"]


def test_a_folder_that_the_repository_ignores_is_packed_when_it_is_asked_for(tmp_path):
    tree(tmp_path, {".git/HEAD": "", ".gitignore": "job/\n", "job/a.py": ""})
    assert names(tmp_path / "job") == ["a.py"]


def digest(root: Path) -> str:
    return pack(root, io.BytesIO()).digest


def test_the_same_content_gives_the_same_archive(tmp_path):
    one = tree(tmp_path / "one", {"b": "2", "a/z": "1", "a/b": "3"})
    two = tree(tmp_path / "two", {"a/b": "3", "a/z": "1", "b": "2"})
    for path in two.rglob("*"):
        os.utime(path, (1, 1))
    (two / "b").chmod(0o640)
    assert digest(one) == digest(two)
    (two / "b").chmod(0o755)
    assert digest(one) != digest(two)


def test_the_archive_tells_nothing_of_this_machine(tmp_path):
    target = io.BytesIO()
    pack(tree(tmp_path, {"a": "1", "d/b": "2"}), target)
    assert target.tell() == 0
    with tarfile.open(fileobj=target) as archive:
        for member in archive:
            assert (member.uid, member.gid, member.uname, member.gname, member.mtime) == (0, 0, "", "", 0)
        assert archive.getnames() == ["a", "d", "d/b"]


def test_links_inside_are_kept_as_links(tmp_path):
    tree(tmp_path, {"a": "1", "d/b": "2"})
    (tmp_path / "d" / "up").symlink_to("../a")
    (tmp_path / "absolute").symlink_to(tmp_path / "d")
    (tmp_path / "nowhere").symlink_to("missing")
    target = io.BytesIO()
    pack(tmp_path, target)
    with tarfile.open(fileobj=target) as archive:
        links = {member.name: member.linkname for member in archive if member.issym()}
    assert links == {"d/up": "../a", "absolute": "d", "nowhere": "missing"}


@pytest.mark.parametrize("link", ["/etc/passwd", "../outside", "d/../../outside", "hop/../../x"])
def test_links_that_lead_out_are_refused(tmp_path, link):
    root = tree(tmp_path / "root", {"a": "", "d/e/f": ""})
    (root / "hop").symlink_to("d/e")
    (root / "bad").symlink_to(link)
    with pytest.raises(InvalidRequest, match="link bad leads out") as error:
        digest(root)
    assert ".tidemillignore" in error.value.mend


def test_an_ignored_link_may_lead_anywhere(tmp_path):
    tree(tmp_path, {".tidemillignore": "bad\n"})
    (tmp_path / "bad").symlink_to("/etc/passwd")
    assert names(tmp_path) == [".tidemillignore"]


def test_pipes_and_sockets_are_left_out(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert names(tree(tmp_path, {"a": ""})) == ["a"]


def test_too_much_names_the_five_largest(tmp_path, monkeypatch):
    monkeypatch.setenv("TIDEMILL_WORKDIR_LIMIT", "100KB")
    tree(tmp_path, {f"f{size}": "x" * size * 1024 for size in (1, 20, 30, 40, 50, 60)})
    with pytest.raises(TooLarge) as error:
        digest(tmp_path)
    assert error.value.data["largest"] == ["f60", "f50", "f40", "f30", "f20"]
    assert "201 KB" in error.value.detail
    assert ".gitignore" in error.value.mend
    monkeypatch.setenv("TIDEMILL_WORKDIR_LIMIT", "1MB")
    assert digest(tmp_path)


def test_a_limit_that_is_no_size_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("TIDEMILL_WORKDIR_LIMIT", "lots")
    with pytest.raises(InvalidRequest, match="lots"):
        digest(tmp_path)


def test_what_is_no_folder_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("missing", "file"):
        with pytest.raises(NotFound, match=name):
            scan(tmp_path / name)


def test_progress_reaches_the_end(tmp_path):
    seen = []
    pack(tree(tmp_path, {"a": "xx", "b": "yyy"}), io.BytesIO(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 5), (5, 5)]
