"""The model registry over real HTTP: versions, their checks and lineage, stages and aliases, and what jobs are given."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.adapters.api_peer import Peer
from tests.adapters.test_screening import safetensors, tarred
from tidemill.cli.main import run
from tidemill.core import promotion
from tidemill.errors import Conflict, Forbidden, InvalidRequest, NotFound
from tidemill.model.ids import ModelId, ProjectId
from tidemill.model.registry import Model, Stage
from tidemill.runner.client import Channel
from tidemill.runner.datacache import DataCache
from tidemill.runner.mounts import provide
from tidemill.sdk.client import Client

NEVER = threading.Event()


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Peer]:
    made = Peer(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def member(peer: Peer, organization: str = "one") -> str:
    """A token of somebody who reads and submits."""
    if (organization, "member") not in peer.tokens:
        body = {"name": "member", "scopes": ["read", "submit"]}
        status, made = peer.call("POST", "/v1/tokens", body, token=peer.token("admin", organization))
        assert status == 201, made
        peer.tokens[organization, "member"] = made["token"]
    return peer.token("member", organization)


def client(peer: Peer, role: str = "member", organization: str = "one", project: str = "default") -> Client:
    token = member(peer, organization) if role == "member" else peer.token(role, organization)
    return Client(f"http://127.0.0.1:{peer.port}", token, project)


def folder(root: Path, number: int = 4, **more: bytes) -> Path:
    """A model of some parameters in a folder."""
    root.mkdir(parents=True)
    (root / "model.safetensors").write_bytes(safetensors(number, {"format": "pt"}))
    (root / "config.json").write_text('{"architectures": ["Tiny"]}')
    for name, content in more.items():
        (root / name.replace("__", ".")).write_bytes(content)
    return root


def events(peer: Peer, kind: str) -> list[dict[str, Any]]:
    found = peer.plane.store.events(limit=10_000)
    return [dict(one.entry.body) | {"project": one.entry.project_id} for one in found if one.entry.type == kind]


def test_a_model_is_pushed_looked_at_promoted_and_pulled(peer: Peer, tmp_path: Path) -> None:
    with client(peer) as one:
        made = one.push_model("tiny", folder(tmp_path / "a", metrics__json=b'{"loss": 0.5}'), metrics={"acc": 0.9})
        assert (made.version, made.files, made.format, made.parameters, made.precision) == (
            1,
            3,
            "safetensors",
            4,
            "F16",
        )
        assert (made.architecture, made.framework) == ("Tiny", "pytorch")
        assert dict(made.metrics) == {"loss": "0.5", "acc": "0.9"}
        assert one.push_model("tiny", tmp_path / "a").version == 1, "the same files are the same version"
        second = one.push_model("tiny", folder(tmp_path / "b", 6))
        assert second.version == 2
        one.promote_model("tiny:1", "production", why="it is the first")
        one.alias_model("tiny:2", "champion", why="it is better")
        assert one.model_version("models:/tiny/Production").version == 1
        assert one.model_version("tiny@champion").version == 2
        assert one.model_version("models:/tiny/latest").version == 2
        one.promote_model("tiny@champion", "production", why="evaluated")
        assert one.model_version("tiny:production").version == 2
        assert one.model_version("tiny:1").stage.stage == "archived"
        pulled = one.pull_model("tiny:production", tmp_path / "out")
        assert {path.name for path in pulled} == {"model.safetensors", "config.json"}
        assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    told = [one for one in events(peer, "ModelPromoted") if one["model"] == "tiny"]
    assert [(it["version"], it["stage"], it["instead_of"], it["why"], it["by"]) for it in told] == [
        (1, "production", 0, "it is the first", "one"),
        (2, "production", 1, "evaluated", "one"),
    ]
    assert {one["project"] for one in told} == {"prj_one_default"}


def test_what_broke_off_is_gone_on_with_and_what_is_wrong_is_fetched_anew(peer: Peer, tmp_path: Path) -> None:
    with client(peer) as one:
        one.push_model("resumed", folder(tmp_path / "a", 40))
        whole = (tmp_path / "a/model.safetensors").read_bytes()
        digest = hashlib.sha256(whole).hexdigest()
        out = tmp_path / "out"
        out.mkdir()
        (out / f".model.safetensors.{digest[:12]}.part").write_bytes(whole[:20])
        (out / "config.json").write_bytes(b"old")
        one.pull_model("resumed", out)
        assert (out / "model.safetensors").read_bytes() == whole
        assert json.loads((out / "config.json").read_bytes()) == {"architectures": ["Tiny"]}
        (out / f".model.safetensors.{digest[:12]}.part").write_bytes(b"wrong")
        (out / "model.safetensors").unlink()
        with pytest.raises(InvalidRequest, match="not what it was"):
            one.pull_model("resumed", out)
        one.pull_model("resumed", out)
        assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]


def test_files_that_are_broken_are_refused_by_both_sides_and_named(peer: Peer, tmp_path: Path) -> None:
    broken = folder(tmp_path / "a", bad__safetensors=b"\xff" * 20)
    with client(peer) as one:
        with pytest.raises(InvalidRequest, match=r"bad\.safetensors: its header is said to have") as told:
            one.push_model("broken", broken)
        assert told.value.mend
        content = b"\xff" * 20
        status, answer = put(peer, content)
        assert status == 201
        status, answer = peer.call(
            "POST", "/v1/models/broken/versions", {"files": [entry("bad.safetensors", content)]},
            token=peer.token("submitter"),
        )  # fmt: skip
        assert (status, answer["field"], answer["value"]) == (422, "files", "bad.safetensors")
        with pytest.raises(NotFound):
            one.model("broken")


def entry(path: str, content: bytes) -> dict[str, Any]:
    return {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def put(peer: Peer, content: bytes, *, role: str = "submitter", organization: str = "one") -> tuple[int, Any]:
    path = f"/v1/model-files/{hashlib.sha256(content).hexdigest()}?project=default"
    headers = {"Content-Type": "application/octet-stream"}
    return peer.call("PUT", path, raw=content, headers=headers, token=peer.token(role, organization))


def test_pickles_need_a_policy_and_somebody_who_asks_and_it_is_written_down(peer: Peer, tmp_path: Path) -> None:
    trapped = folder(tmp_path / "a", weights__dat=pickle.dumps({"a": print}))
    with client(peer) as one, client(peer, "admin") as admin:
        with pytest.raises(InvalidRequest, match=r"weights\.dat can run code") as refused:
            one.push_model("trapped", trapped)
        assert "safetensors" in refused.value.mend
        assert "--allow-pickle" in refused.value.mend
        with pytest.raises(Forbidden, match="does not let pickles in") as forbidden:
            one.push_model("trapped", trapped, allow_pickles=True)
        assert "tidemill model policy" in forbidden.value.mend
        with pytest.raises(Forbidden):
            one.model_policy("allow")
        by_admin = admin.push_model("trapped", trapped, allow_pickles=True)
        assert by_admin.pickles == ("weights.dat",)
        assert by_admin.pickles_allowed == "one, as an administrator"
        assert admin.model_policy("allow") == "allow"
        (trapped / "more.txt").write_text("x")
        by_policy = one.push_model("trapped", trapped, allow_pickles=True)
        assert by_policy.pickles_allowed == "one, by the policy of project default"
        with pytest.raises(InvalidRequest, match="can run code"):
            one.push_model("other", trapped)
        assert admin.model_policy("refuse") == "refuse"
        assert client(peer, project="other").model_policy() == "refuse"
    assert [it["pickles"] for it in events(peer, "ModelPolicySet")] == ["allow", "refuse"]
    assert peer.plane.store.projects()[0].allows_pickles is False


def test_another_projects_models_and_files_are_not_there(peer: Peer, tmp_path: Path) -> None:
    with client(peer) as one, client(peer, organization="two") as two, client(peer, project="other") as other:
        made = one.push_model("private", folder(tmp_path / "a", 12))
        content = (tmp_path / "a/model.safetensors").read_bytes()
        for stranger in (two, other):
            with pytest.raises(NotFound):
                stranger.model_version("private")
        body = {"files": [entry("model.safetensors", content)], "project": "default"}
        status, answer = peer.call("POST", "/v1/models/stolen/versions", body, token=peer.token("submitter", "two"))
        assert (status, answer["value"]) == (422, "model.safetensors"), "to know a SHA-256 is not to have the file"
        assert "was not uploaded" in answer["detail"]
        digest = hashlib.sha256(content).hexdigest()
        for path in (f"/v1/model-files/{digest}", f"/v1/models/private/versions/1/files/{digest}"):
            method = "HEAD" if "model-files" in path else "GET"
            assert peer.call(method, path, token=member(peer, "two"))[0] == 404
        assert made.version == 1
    status, _ = put(peer, b"x", role="reader")
    assert status == 403


def test_versions_that_are_needed_are_not_deleted_and_numbers_are_not_given_again(peer: Peer, tmp_path: Path) -> None:
    with client(peer) as one:
        for number in (1, 2, 3):
            one.push_model("kept", folder(tmp_path / str(number), number))
        one.promote_model("kept:1", "production")
        one.alias_model("kept:2", "champion")
        for reference, why in (("kept:1", "is in production"), ("kept:2", "champion points to")):
            with pytest.raises(Conflict, match=why):
                one.delete_model_version(reference)
        with pytest.raises(Conflict):
            one.delete_model("kept")
        files = peer.plane.models.files(ProjectId("prj_one_default"))
        third = hashlib.sha256((tmp_path / "3/model.safetensors").read_bytes()).hexdigest()
        shared = hashlib.sha256((tmp_path / "3/config.json").read_bytes()).hexdigest()
        assert files.exists(third)
        assert one.delete_model_version("kept:3").version == 3
        assert not files.exists(third)
        assert files.exists(shared), "other versions have it"
        assert one.push_model("kept", folder(tmp_path / "again", 3)).version == 4
        one.unalias_model("kept", "champion")
        one.promote_model("kept:1", "archived")
        assert one.delete_model("kept").name == "kept"
        with pytest.raises(NotFound):
            one.model("kept")
        assert one.push_model("kept", tmp_path / "again").version == 5
    assert [it["version"] for it in events(peer, "ModelVersionDeleted")] == [3]


def test_files_that_became_part_of_nothing_are_swept_after_a_while(peer: Peer, tmp_path: Path) -> None:
    project = ProjectId("prj_one_default")
    files = peer.plane.models.files(project)
    content = os.urandom(64)
    assert put(peer, content)[0] == 201
    digest = hashlib.sha256(content).hexdigest()
    peer.plane.models.sweep()
    assert files.exists(digest), "somebody may be about to name it"
    with client(peer) as one:
        made = one.push_model("swept", folder(tmp_path / "a", 33))
    needed = peer.plane.models.manifest(peer.plane.store.project_model_versions(project, digest=made.digest)[0])
    long_ago = time.time() - 30 * 86_400
    for one_digest in (digest, *(file.digest for file in needed.files)):
        os.utime(files.path(one_digest), (long_ago, long_ago))
    assert peer.plane.models.sweep() == 1
    assert not files.exists(digest)
    assert all(files.exists(file.digest) for file in needed.files)


def output(peer: Peer, job_id: str) -> Path:
    row = peer.plane.store.job(job_id)  # type: ignore[arg-type]
    assert row is not None
    return peer.plane.outputs.folder(row.job)


def test_a_version_knows_the_job_that_made_it_and_the_job_what_it_made(peer: Peer, tmp_path: Path) -> None:
    with client(peer) as one:
        base = one.push_model("base", folder(tmp_path / "base", 7))
        job_id, launch = peer.running(name="train", model="models:/base/latest", labels={"git-commit": "abc123"})
        folder(output(peer, job_id) / "model", 8, metrics__json=b'{"loss": 1.25}')
        made = one.push_model("derived", job=job_id, path="model")
        assert made.lineage.job == job_id
        assert (made.lineage.workload, made.lineage.commit, made.lineage.source) == (
            "train",
            "abc123",
            f"{job_id}:model",
        )
        assert [(it.reference, it.digest) for it in made.lineage.models] == [("base:1", base.digest)]
        assert len(made.lineage.spec_digest) == 64
        assert dict(made.metrics) == {"loss": "1.25"}
        assert [it.reference for it in one.job_models(job_id)] == ["derived:1"]
        assert [it.name for it in one.model_version("base:1").used_by] == ["train"]
        with pytest.raises(Conflict, match="used by what is not over: train"):
            one.delete_model_version("base:1")
        (output(peer, job_id) / "model" / "evil").symlink_to("/etc/passwd")
        with pytest.raises(InvalidRequest, match="evil"):
            one.push_model("derived", job=job_id, path="model")
    inside = Client(f"http://127.0.0.1:{peer.port}", launch.job_token)
    with inside:
        own = inside.push_model("derived", folder(tmp_path / "inside", 9))
        assert (own.version, own.lineage.job) == (2, job_id)
        with pytest.raises(Forbidden):
            inside.promote_model("derived:2", "production")


def test_an_artifact_becomes_a_model_and_an_archive_that_leaves_its_folder_does_not(peer: Peer) -> None:
    job_id, _ = peer.running(name="packs")
    folder(output(peer, job_id) / "model", 11)
    with client(peer) as one:
        one.create_artifact("packed", job=job_id, path="model")
        made = one.push_model("unpacked", artifact="packed:1")
        assert (made.files, made.parameters, made.lineage.job) == (2, 11, job_id)
        assert made.lineage.source == "artifact packed:1"
        for content in (tarred({"../evil": b"x"}, "w:gz"), tarred({"link": b""}, "w:gz", kind=b"2")):
            digest = hashlib.sha256(content).hexdigest()
            peer.plane.blobs.put(digest, [content])
            with pytest.raises(InvalidRequest, match=r"evil|link"):
                peer.plane.models.take_archive(ProjectId("prj_one_default"), digest)


def test_a_job_is_given_the_version_that_its_reference_meant_when_it_was_submitted(peer: Peer, tmp_path: Path) -> None:
    with client(peer) as one:
        first = one.push_model("served", folder(tmp_path / "a", 21))
        one.promote_model("served:1", "production")
        job_id = peer.submit(name="serve", model={"from": "models:/served/production", "at": "/model"})["jobs"][0]["id"]
        one.push_model("served", folder(tmp_path / "b", 22))
        one.promote_model("served:2", "production")
        later = peer.submit(name="later", model="models:/served/production")["jobs"][0]["id"]
        launch, next_launch = peer.launched(job_id), peer.launched(later)
        assert (launch.data[0].dataset, launch.data[0].digest) == ("served:1", first.digest)
        assert next_launch.data[0].dataset == "served:2"
        spec = peer.plane.store.job(job_id).workload.spec
        again = peer.plane.acceptance.pin(spec, peer.plane.projects.by_id[ProjectId("prj_one_default")])
        assert again == spec, "who goes back to an earlier spec gets the same octets"
        told = dict(launch.environment_variables)
        assert (told["TIDEMILL_MODEL"], told["TIDEMILL_MODEL_DIGEST"]) == ("served:1", first.digest)
        for reference in ("models:/served/staging", "models:/none/1", "models:/served@none"):
            status, answer = peer.call(
                "POST", "/v1/workloads", {"spec": {"name": "w", "run": "true", "model": reference}}
            )
            assert (status, answer["field"], answer["value"]) == (422, "model.from", reference)
    channel = Channel(
        api_url=f"http://127.0.0.1:{peer.port}", endpoint_file=None, token=launch.runner_token,
        prefix=f"/v1/runners/{launch.launch_id}", ca="",
    )  # fmt: skip
    mount = {"dataset": "served:1", "model": "models:/served/production", "digest": first.digest, "mode": "copy"}
    tree, is_copy = provide(mount, "prj_one_default", DataCache(tmp_path / "cache"), channel, stopping=NEVER)
    assert is_copy
    assert (tree / "model.safetensors").read_bytes() == (tmp_path / "a/model.safetensors").read_bytes()
    assert not os.access(tree / "model.safetensors", os.W_OK) or os.geteuid() == 0


def test_the_command_line_says_it_all(
    peer: Peer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TIDEMILL_API_URL", f"http://127.0.0.1:{peer.port}")
    monkeypatch.setenv("TIDEMILL_TOKEN", member(peer))
    monkeypatch.setenv("TIDEMILL_PROJECT", "default")

    def said(*arguments: str) -> str:
        assert run(["model", *arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    weights = folder(tmp_path / "a", 1_000)
    assert "spoken:1  2 files" in said("push", "spoken", str(weights), "--metric", "loss=1.5", "--licence", "mit")
    (weights / "more.txt").write_text("x")
    said("push", "spoken", str(weights))
    assert "is in production" in said("promote", "spoken:1", "--why", "first")
    assert "is in production instead of 1" in said("promote", "spoken:2")
    assert "is spoken@champion" in said("alias", "spoken:2", "champion", "--why", "best")
    shown = said("show", "spoken:1")
    for words in ("archived since", "1,000 (1,000 in F16)", "mit", "loss=1.5", "other versions"):
        assert words in shown
    assert "champion=2" in said("list")
    assert "is archived" in said("archive", "spoken:2")
    assert "is in no stage" in said("demote", "spoken:1")
    assert "has no alias champion" in said("unalias", "spoken", "champion")
    assert "3 files in" in said("pull", "spoken", str(tmp_path / "out"))
    assert json.loads(said("show", "spoken", "--json"))["version"] == 2
    assert "pickles are refused" in said("policy")
    assert run(["model", "delete", "spoken"]) != 0
    assert "deleted spoken:2" in said("delete", "spoken:2")
    assert "deleted spoken, with all" in said("delete", "spoken", "--all")
    capsys.readouterr()
    assert run(["model", "promote", "spoken:1", "--to", "prod"]) != 0
    assert "no stage to promote to" in capsys.readouterr().err


MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("stage"), st.integers(1, 4), st.sampled_from(list(Stage))),
        st.tuples(st.just("alias"), st.integers(1, 4), st.sampled_from(["a", "b"])),
        st.tuples(st.just("gone"), st.integers(1, 4), st.none()),
    ),
    max_size=20,
)


def check_names_mean_one_version(moves: list[Any]) -> None:
    model, stages, aliases = Model(id=ModelId("m"), project_id=ProjectId("p"), name="m"), {}, {}
    for now, (kind, number, what) in enumerate(moves, 1):
        if kind == "stage":
            model = promotion.placed(model, number, what, now=now, by="x")
            stages = {other: stage for other, stage in stages.items() if other != number}
            if what in (Stage.STAGING, Stage.PRODUCTION):
                stages = {other: Stage.ARCHIVED if stage is what else stage for other, stage in stages.items()}
            if what is not Stage.NONE:
                stages[number] = what
        elif kind == "alias":
            model = promotion.pointed(model, what, number, now=now, by="x")
            aliases[what] = number
        else:
            model = promotion.forgotten(model, number, now=now)
            stages.pop(number, None)
            aliases = {name: to for name, to in aliases.items() if to != number}
        assert {one.number: one.stage for one in model.placings} == stages
        assert {one.name: one.number for one in model.aliases} == aliases
        assert len([one for one in model.placings if one.stage is Stage.PRODUCTION]) <= 1


@settings(max_examples=150, deadline=None)
@given(MOVES)
def test_a_stage_and_an_alias_mean_one_version_at_a_time(moves: list[Any]) -> None:
    check_names_mean_one_version(moves)


def test_the_property_catches_a_stage_that_keeps_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promotion, "_FOR_ONE", (Stage.STAGING,))
    with pytest.raises(AssertionError):
        check_names_mean_one_version([("stage", 1, Stage.PRODUCTION), ("stage", 2, Stage.PRODUCTION)])


FETCH = """
import os, sys, threading, time
from pathlib import Path
from tidemill.runner.client import Channel
from tidemill.runner.datacache import DataCache
from tidemill.runner.mounts import provide

url, token, launch, digest, root, pauses = sys.argv[1:]
write = os.pwrite

def written(*arguments):
    done = write(*arguments)
    print("written", flush=True)
    time.sleep(60)
    return done

if pauses == "yes":
    os.pwrite = written
channel = Channel(api_url=url, endpoint_file=None, token=token, prefix=f"/v1/runners/{launch}", ca="")
mount = {"dataset": "large:1", "model": "large:1", "digest": digest, "mode": "copy"}
print(provide(mount, "prj_one_default", DataCache(Path(root)), channel, stopping=threading.Event())[0])
"""


def test_a_fetch_that_is_killed_leaves_nothing_half_valid_and_is_gone_on_with(peer: Peer, tmp_path: Path) -> None:
    with client(peer) as one:
        made = one.push_model("large", folder(tmp_path / "large", 1_500_000))
    launch = peer.launched(peer.submit(name="fetches", model="large:1")["jobs"][0]["id"])
    cache = tmp_path / "cache"

    def fetch(pauses: str) -> subprocess.Popen[str]:
        arguments = [
            f"http://127.0.0.1:{peer.port}",
            launch.runner_token,
            launch.launch_id,
            made.digest,
            str(cache),
            pauses,
        ]
        return subprocess.Popen([sys.executable, "-c", FETCH, *arguments], stdout=subprocess.PIPE, text=True)

    with fetch("yes") as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "written\n"
        first.kill()
    assert first.returncode == -9
    assert DataCache(cache).present() == ()
    parts = [path.stat().st_size for path in cache.glob("*/parts/*")]
    assert any(0 < size < made.size for size in parts), "what had come is kept, and is no file of the model"
    with fetch("no") as second:
        assert second.stdout is not None
        tree = Path(second.stdout.read().strip())
    assert second.returncode == 0
    assert (tree / "model.safetensors").read_bytes() == (tmp_path / "large/model.safetensors").read_bytes()
    assert DataCache(cache).present() == (f"prj_one_default/{made.digest}",)
