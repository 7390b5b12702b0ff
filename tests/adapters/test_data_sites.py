"""Data sets and volumes through the real processes: from folders, from S3 (moto's server), to machines elsewhere."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from tests.adapters.test_joining import Joined
from tests.cloud import eventually
from tidemill.errors import Conflict, Infeasible, InvalidRequest, InvalidSpec, NotFound
from tidemill.model.storage import read_manifest
from tidemill.sdk.client import Client
from tidemill.sdk.results import LogChunk

SHOW = "cd $WHERE; find . -type f | LC_ALL=C sort | xargs -d '\\n' sha256sum; touch x 2>/dev/null && echo written || echo read-only"


class S3:
    """Moto's server with a bucket."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self.server.start()
        host, port = self.server.get_host_and_port()
        self.url = f"http://{host}:{port}"
        keys = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
        self.client = boto3.client("s3", region_name="us-east-1", endpoint_url=self.url, **keys)
        self.client.create_bucket(Bucket="models")

    def fill(self, prefix: str, files: dict[str, bytes]) -> None:
        for path, content in files.items():
            self.client.put_object(Bucket="models", Key=f"{prefix}/{path}", Body=content)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    made = S3()
    yield made
    made.server.stop()


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Joined]:
    """This machine, and one that joined at another site."""
    made = Joined(tmp_path_factory.mktemp("data"))
    try:
        assert made.cloud.call("PUT", "/v1/sites/edge", {"kind": "edge"})[0] == 200
        made.join("second", site="edge")
        yield made
    finally:
        made.close()


FILES = {"a.txt": b"hello", "deep/b c.bin": random.Random(7).randbytes(300_000), "deep/empty": b"", "ä+%.txt": b"x"}


def sums(files: dict[str, bytes]) -> str:
    return "".join(f"{hashlib.sha256(files[path]).hexdigest()}  ./{path}\n" for path in sorted(files))


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def client(joined: Joined) -> Client:
    return Client(f"http://127.0.0.1:{joined.cloud.port}", joined.cloud.token)


def run(joined: Joined, spec: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The job when it is over, and its output."""
    job = joined.cloud.submit({"name": "reader", "run": SHOW, "envs": {"WHERE": "/data/images"}} | spec)
    ended = joined.cloud.wait(job)
    with client(joined) as it:
        return ended, "".join(one.text for one in it.logs(job, follow=False) if isinstance(one, LogChunk))


HERE = {"placement": {"sites": ["local"]}}
THERE = {"placement": {"sites": ["edge"]}}


def test_a_data_set_in_s3_is_read_once_and_copied_to_the_machine(joined: Joined, s3: S3) -> None:
    s3.fill("images", FILES)
    with client(joined) as it:
        it.put_secret("S3KEYS", "test:test")
        added = it.add_dataset("images", "s3://models/images", endpoint=s3.url, secret="S3KEYS")
        assert added.state in ("scanning", "ready")
        found = it.await_dataset("images")
        assert (found.state, found.files, found.size) == ("ready", len(FILES), sum(map(len, FILES.values()))), found
        ended, output = run(joined, {"data": ["images"]} | THERE)
        assert (ended["state"], output) == ("succeeded", sums(FILES) + "read-only\n")
        assert it.verify_dataset("images") == ""
        s3.fill("images", {"a.txt": b"HELLO", "new": b""})
        assert it.verify_dataset("images") == "1 file changed: a.txt. 1 file new: new."
        ended, output = run(joined, {"data": ["images"]} | THERE)  # from the copy
        assert (ended["state"], output) == ("succeeded", sums(FILES) + "read-only\n")
        ended, _ = run(joined, {"data": ["images"]} | HERE)  # no copy here, and S3 has another a.txt now
        assert ended["state"] == "failed"
        assert "a.txt of the data set images:1 is not what it was" in json.dumps(ended)
        assert it.add_dataset("images", "s3://models/images", endpoint=s3.url, secret="S3KEYS").version == 2
        assert it.await_dataset("images").files == len(FILES) + 1
        it.delete_dataset("images:1")
        assert [one.version for one in it.datasets() if one.name == "images"] == [2]


def test_what_s3_says_is_told(joined: Joined, s3: S3) -> None:
    with client(joined) as it:
        it.add_dataset("gone", "s3://models/nothing-there", endpoint=s3.url)
        failed = it.await_dataset("gone")
        assert (failed.state, failed.detail) == ("failed", "There is nothing below that address.")
        with pytest.raises(InvalidSpec, match="gone:1 could not be read: There is nothing"):
            it.submit({"run": "true", "data": ["gone"]})
        with pytest.raises(NotFound, match="no secret NONE"):
            it.add_dataset("more", "s3://models/x", secret="NONE")
        with pytest.raises(InvalidRequest, match="s3://bucket/prefix"):
            it.add_dataset("more", "s3://?")
        it.put_secret("NOPAIR", "just-one")
        it.add_dataset("bad", "s3://models/images", endpoint=s3.url, secret="NOPAIR")
        assert it.await_dataset("bad").detail == "The secret is not a pair of keys."


def test_a_folder_is_mounted_at_home_and_copied_elsewhere(joined: Joined, tmp_path: Path) -> None:
    texts = FILES | {"own": b"these are not the images"}
    folder = write(tmp_path / "texts", texts)
    where = {"envs": {"WHERE": "/data/texts"}}
    with client(joined) as it:
        added = it.add_dataset("texts", folder)
        assert (added.state, added.version, added.site, added.home) == ("ready", 1, "local", str(folder))
        assert it.add_dataset("texts", folder).version == 1
        size = sum(map(len, texts.values()))
        assert [it.quote({"run": "x", "data": ["texts"]} | place).copy_bytes for place in (HERE, THERE)] == [0, size]
        for place in (HERE, THERE):
            ended, output = run(joined, {"data": ["texts"]} | where | place)
            assert (ended["state"], output) == ("succeeded", sums(texts) + "read-only\n")
        eventually(lambda: it.dataset("texts").cached_on == ("second",), within_s=30, what="its copy is seen")
        assert it.quote({"run": "x", "data": ["texts"]} | THERE).copy_ns == 0
        digest = read_manifest(it.manifest("texts")).digest
        assert digest == added.digest
        copies = list(joined.folder.glob(f"*/local/cache/data/*/sets/{digest}/tree"))
        assert [path.relative_to(joined.folder).parts[0] for path in copies] == ["second"]
        assert it.verify_dataset("texts") == ""
        (folder / "a.txt").write_text("longer than it was")
        assert it.verify_dataset("texts") == "1 file changed: a.txt."
        ended, _ = run(joined, {"data": ["texts"]} | where | HERE)
        assert "a.txt of the data set texts:1 has 18 bytes and had 5" in json.dumps(ended)


def test_a_folder_of_another_site_comes_through_the_control_plane(joined: Joined, tmp_path: Path) -> None:
    big = {"big": random.Random(3).randbytes(9 << 20)}
    folder = write(tmp_path / "far", FILES | big)
    with client(joined) as it:
        assert it.add_dataset("far", folder, site="edge").site == "edge"
        spec = {"data": [{"dataset": "far", "at": "/far", "mode": "copy"}], "envs": {"WHERE": "/far"}}
        for place in (HERE, THERE):
            ended, output = run(joined, spec | place)
            assert (ended["state"], output) == ("succeeded", sums(FILES | big) + "read-only\n")


def test_a_volume_is_shared_and_binds_its_jobs_to_its_site(joined: Joined, tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    with client(joined) as it:
        made = it.create_volume("scratch", str(folder), site="edge")
        assert (made.site, made.path) == ("edge", str(folder))
        assert it.create_volume("scratch", str(folder), site="edge").id == made.id
        with pytest.raises(Conflict, match="another volume of that name"):
            it.create_volume("scratch", str(folder))
        write_it = "echo $TIDEMILL_JOB_NAME >> $TIDEMILL_VOLUME_SCRATCH/names; cat /volumes/scratch/names"
        one, _ = run(joined, {"name": "one", "run": write_it, "volumes": ["scratch"]})
        two, output = run(joined, {"name": "two", "run": write_it, "volumes": ["scratch"]})
        assert output == "one\ntwo\n"
        assert [job["workers"][0]["node"] for job in (one, two)] == ["second", "second"]
        spec = {"run": "echo x > /v/names && echo written || echo refused", "volumes": [
            {"name": "scratch", "at": "/v", "read_only": True}]}  # fmt: skip
        assert run(joined, spec)[1].endswith("refused\n")
        with pytest.raises(InvalidSpec, match="scratch is at site edge, and placement asks for local"):
            it.submit({"run": "true", "volumes": ["scratch"]} | HERE)
        it.create_volume("other", str(tmp_path), site="local", node="nobody")
        with pytest.raises(InvalidSpec, match="other is at local, scratch at edge: no machine has both"):
            it.submit({"run": "true", "volumes": ["scratch", "other"]})
        with pytest.raises(Infeasible):
            it.submit({"run": "true", "volumes": ["other"]})
        with pytest.raises(InvalidSpec, match="has no volume nothing"):
            it.submit({"run": "true", "volumes": ["nothing"]})
        with pytest.raises(InvalidRequest, match="Tidemill's own"):
            it.create_volume("own", str(joined.cloud.home))
        held = it.submit({"name": "holds", "run": "sleep 600", "volumes": ["scratch"]})
        with pytest.raises(Conflict, match="holds uses it"):
            it.delete_volume("scratch")
        joined.cloud.call("POST", f"/v1/jobs/{held.jobs[0].id}/stop")
        joined.cloud.wait(held.jobs[0].id)
        assert it.delete_volume("scratch").name == "scratch"
        assert (folder / "names").exists()


def test_a_data_set_may_be_for_some_sites_only(joined: Joined, tmp_path: Path) -> None:
    folder = write(tmp_path / "mounted", FILES)
    with client(joined) as it:
        it.add_dataset("mounted", folder, site="edge")
        spec = {"data": [{"dataset": "mounted", "at": "/mounted", "mode": "mount"}], "envs": {"WHERE": "/mounted"}}
        ended, output = run(joined, spec)
        assert (ended["state"], ended["workers"][0]["node"]) == ("succeeded", "second")
        assert output == sums(FILES) + "read-only\n"
