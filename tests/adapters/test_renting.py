"""A cloud that rents: work that nothing here can run has a machine rented for it, which joins, works, and is given back."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.aws import REGION, Aws
from tests.cloud import Cloud, eventually
from tidemill.errors import Unauthorized
from tidemill.outpost import joining
from tidemill.outpost.config import OutpostConfig


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Aws]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    made = Aws()
    monkeypatch.setenv("AWS_ENDPOINT_URL", made.door.url)
    yield made
    made.close()


@pytest.fixture
def cloud(aws: Aws, tmp_path: Path) -> Iterator[Cloud]:
    section = {
        "site": "burst", "address": "head:7070", "region": REGION, "image": aws.image,
        "instance_types": ["m5.4xlarge"], "prices": {"m5.4xlarge": 0.9}, "markets": ["on_demand"],
        "waiting_costs": {"job": 100}, "max_instances": 1, "max_per_hour": 5, "max_per_month": 100, "idle": "1s",
    }  # fmt: skip
    made = Cloud(tmp_path / "head", cloud=section, reserve_cpus=0.5)
    made.up()
    yield made
    made.down()


def rentals(cloud: Cloud) -> dict[str, Any]:
    status, found = cloud.call("GET", "/v1/rentals")
    assert status == 200, found
    return dict(found)


def one(cloud: Cloud, *states: str) -> dict[str, Any]:
    """The rental, once it is in one of these states."""

    def look() -> dict[str, Any] | None:
        found = rentals(cloud)
        return next((dict(item) for item in found["items"] if item["state"] in states), None)

    return dict(eventually(look, within_s=60, what=f"a rental is {states}: {rentals(cloud)}"))


@pytest.mark.long
def test_what_nothing_here_can_run_is_rented_for_and_given_back(aws: Aws, cloud: Cloud, tmp_path: Path) -> None:
    status, refused = cloud.call("POST", "/v1/workloads", {"spec": {"run": "true", "resources": {"cpus": 1_000}}})
    assert (status, refused["code"]) == (422, "infeasible"), "what nothing on offer can run is refused at the door"
    job = cloud.submit({"name": "large", "run": "true", "resources": {"cpus": 12}})
    rental = one(cloud, "wanted", "booting")
    instance = eventually(lambda: next(iter(aws.living()), ""), within_s=30, what="an instance runs")
    eventually(lambda: rentals(cloud)["items"][0]["instance"] == instance, within_s=30, what="it is known by its id")
    assert rental["jobs"] == [job]
    assert rental["micro_per_hour"] == 900_000
    script = base64.b64decode(aws.attribute(instance, "userData")).decode()
    token = str(re.search(r"TIDEMILL_JOIN_TOKEN=(\S+)", script)[1])  # type: ignore[index]
    assert f"join head:7070 --name {rental['machine']}" in script

    home, url = tmp_path / "rented", f"http://127.0.0.1:{cloud.port}"
    asked = OutpostConfig(control_url=url, key="", node_id="", name="other", address="127.0.0.1")
    with pytest.raises(Unauthorized, match="alone"):
        joining.join(tmp_path / "thief", token, asked)
    joining.join(home, token, OutpostConfig(**{**_plain(asked), "name": rental["machine"]}))
    joining.start_outpost(home)
    try:
        joined = one(cloud, "joined")
        assert joined["machine"] == rental["machine"]
        sites = {site["name"]: site for site in cloud.call("GET", "/v1/sites")[1]["items"]}
        assert (sites["burst"]["kind"], sites["burst"]["nodes"]) == ("cloud", 1)
        cloud.call("POST", f"/v1/jobs/{job}/stop")
        over = one(cloud, "over")
        assert over["cause"]
        assert not aws.living()
        nodes = [node["name"] for node in cloud.call("GET", "/v1/nodes")[1]["items"]]
        assert rental["machine"] not in nodes
        with pytest.raises(Unauthorized):
            joining.join(home, token, OutpostConfig(**{**_plain(asked), "name": rental["machine"]}))
    finally:
        joining.stop_outpost(home)


def _plain(config: OutpostConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}
