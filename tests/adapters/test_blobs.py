"""Blobs: whole and right, or not there."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidemill.api.jobs import tar_pieces
from tidemill.control.blobs import BlobStore
from tidemill.errors import Conflict, InvalidRequest, NotFound, StorageFull


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "output"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "model.bin").write_bytes(b"weights" * 1_000)
    (root / "deep" / "er" / "run.sh").write_text("#!/bin/sh\n")
    (root / "deep" / "er" / "run.sh").chmod(0o755)
    (root / "deep" / "link").symlink_to("er/run.sh")
    (root / "ünï.txt").write_text("x")
    return root.resolve()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_blob_is_stored_once_and_read_back(blobs: BlobStore) -> None:
    data = os.urandom(100_000)
    assert blobs.put(sha256(data), [data[:10], data[10:]]) == len(data)
    assert blobs.exists(sha256(data))
    assert blobs.size(sha256(data)) == len(data)
    with blobs.open(sha256(data)) as file:
        assert file.read() == data
    assert blobs.put("sha256:" + sha256(data), [data]) == len(data)


def test_wrong_content_leaves_nothing(blobs: BlobStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as wrong:
        blobs.put(sha256(b"right"), [b"wrong"])
    assert sha256(b"wrong") in wrong.value.detail
    assert not blobs.exists(sha256(b"right"))
    assert names(tmp_path / "blobs") == []


def test_a_broken_upload_leaves_nothing(blobs: BlobStore, tmp_path: Path) -> None:
    def broken() -> Iterator[bytes]:
        yield b"half"
        raise ConnectionResetError

    with pytest.raises(ConnectionResetError):
        blobs.put(sha256(b"half and half"), broken())
    assert names(tmp_path / "blobs") == []


def test_drafts_of_a_killed_process_are_cleared_away(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    left = store.draft(sha256(b"x"))
    left.__enter__()
    left.write(b"half")
    assert names(tmp_path)
    BlobStore(tmp_path)
    assert names(tmp_path) == []


@pytest.mark.parametrize("digest", ["", "abc", "../../etc/passwd", "A" * 64, "g" * 64, "a" * 63 + "\n", "a" * 65])
def test_what_is_no_digest_is_refused(blobs: BlobStore, digest: str) -> None:
    with pytest.raises(InvalidRequest):
        blobs.path(digest)


def test_what_is_not_there_is_not_found(blobs: BlobStore) -> None:
    with pytest.raises(NotFound):
        blobs.open(sha256(b"nothing"))
    with pytest.raises(NotFound):
        blobs.size(sha256(b"nothing"))


def test_a_full_disk_leaves_nothing_half_done(
    blobs: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull):
        blobs.put(sha256(b"data"), [b"data"])
    monkeypatch.undo()
    assert names(tmp_path / "blobs") == []
    assert blobs.put(sha256(b"data"), [b"data"]) == 4


def test_packing_gives_the_same_archive_for_the_same_content(blobs: BlobStore, folder: Path, tmp_path: Path) -> None:
    digest, size = blobs.pack(folder)
    other = tmp_path / "copy"
    other.mkdir()
    with tarfile.open(blobs.path(digest)) as archive:
        archive.extractall(other, filter="data")
    for path in (*folder.rglob("*"), *other.rglob("*")):
        os.utime(path, (1, 1), follow_symlinks=False)
    assert blobs.pack(other.resolve()) == (digest, size)
    assert names(other) == names(folder)
    assert os.access(other / "deep" / "er" / "run.sh", os.X_OK)
    assert (other / "deep" / "link").read_text() == "#!/bin/sh\n"


def test_a_single_file_is_packed_under_its_name(blobs: BlobStore, folder: Path) -> None:
    digest, _ = blobs.pack(folder / "model.bin")
    with tarfile.open(blobs.path(digest)) as archive:
        assert archive.getnames() == ["model.bin"]


def test_a_tar_stream_has_the_same_members(blobs: BlobStore, folder: Path) -> None:
    digest, _ = blobs.pack(folder)
    with (
        tarfile.open(fileobj=io.BytesIO(b"".join(tar_pieces(folder)))) as streamed,
        tarfile.open(blobs.path(digest)) as packed,
    ):
        assert streamed.getnames() == packed.getnames()
        member = streamed.extractfile("model.bin")
        assert member is not None
        assert member.read() == b"weights" * 1_000


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret.key", "deep/../../secret.key"])
def test_a_link_that_leaves_the_folder_is_refused(blobs: BlobStore, folder: Path, target: str) -> None:
    (folder / "out").symlink_to(target)
    with pytest.raises(InvalidRequest, match="outside"):
        blobs.pack(folder)


def test_a_link_put_in_the_way_is_not_followed(blobs: BlobStore, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "secret.key").write_text("pepper")
    (folder / "swapped").symlink_to(tmp_path / "secrets")
    with pytest.raises(InvalidRequest):
        blobs.pack(folder / "swapped")
    with pytest.raises(InvalidRequest):
        blobs.pack(folder / "swapped" / "secret.key")


def test_a_pipe_is_refused_and_not_waited_for(blobs: BlobStore, folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    with pytest.raises(InvalidRequest, match="neither"):
        blobs.pack(folder)


def test_a_file_that_shrinks_meanwhile_is_a_conflict(folder: Path) -> None:
    pieces = tar_pieces(folder / "model.bin")
    next(pieces)
    (folder / "model.bin").write_bytes(b"")
    with pytest.raises(Conflict):
        list(pieces)


def test_nothing_there_is_not_found(blobs: BlobStore, folder: Path) -> None:
    with pytest.raises(NotFound):
        blobs.pack(folder / "nothing")
    with pytest.raises(NotFound):
        blobs.pack(folder / "nothing" / "below")


@given(content=st.binary(max_size=300_000))
def test_archives_hold_exactly_the_content(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("any").resolve()
    (root / "f").write_bytes(content)
    store = BlobStore(root / "blobs")
    digest, _ = store.pack(root / "f")
    with gzip.open(store.path(digest)) as squeezed, tarfile.open(fileobj=io.BytesIO(squeezed.read())) as archive:
        member = archive.extractfile("f")
        assert member is not None
        assert member.read() == content
