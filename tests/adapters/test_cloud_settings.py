"""The section ``cloud`` is read whole, and what is wrong in it is named."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tidemill.control import cloudsettings
from tidemill.control.cloudsettings import cloud_settings
from tidemill.errors import InvalidSetting
from tidemill.model.cloud import Market
from tidemill.units import HOUR_NS, MINUTE_NS, USD_MICRO

PAGE = Path(__file__).parent.parent.parent / "docs" / "cloud.md"


def written() -> dict[str, Any]:
    """The section that the page shows."""
    block = re.search(r"```yaml\n(cloud:.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert block is not None
    section: dict[str, Any] = yaml.safe_load(block[1])["cloud"]
    return section


def test_the_pages_section_is_read() -> None:
    found = cloud_settings(written())
    assert (found.site, found.ec2.region, found.boot.address) == ("burst", "eu-west-1", "https://head.example.org:7070")
    assert found.ec2.prices == {"g5.xlarge": 1_123_000, "g5.12xlarge": 6_319_000}
    assert found.ec2.markets == (Market.SPOT, Market.ON_DEMAND)
    assert found.ec2.spot_headroom_milli == 1_250
    policy = found.policy
    assert (policy.waiting_gpu_micro_per_hour, policy.waiting_job_micro_per_hour) == (2 * USD_MICRO, 0)
    assert (policy.max_instances, policy.max_micro_per_hour, policy.max_micro_per_month) == (4, 20_000_000, 500_000_000)
    assert (policy.idle_ns, policy.boot_limit_ns) == (10 * MINUTE_NS, 15 * MINUTE_NS)
    assert policy.horizon_ns == 24 * HOUR_NS


def test_every_setting_is_on_the_page_and_no_other() -> None:
    listed = re.findall(r"^\| `([a-z_]+)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(set(cloudsettings._READERS) - {"endpoint_url"})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("site", ""), ("region", ""), ("image", ""), ("instance_types", []), ("address", ""),
        ("vendor", "gce"), ("markets", ["futures"]), ("prices", {"g5.xlarge": "much"}), ("prices", [1]),
        ("max_instances", -1), ("max_instances", 1.5), ("max_instances", True), ("max_per_hour", "NaN"),
        ("max_per_month", -1), ("boot", "soon"), ("boot", True), ("disk", "large"), ("deadlines", "maybe"),
        ("waiting_costs", {"day": 1}), ("waiting_costs", 3), ("spot_headroom", "a lot"), ("spot_headroom", 0.5),
        ("subnets", {"a": 1}), ("setup", ["a"]),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(name: str, value: Any) -> None:
    with pytest.raises(InvalidSetting) as caught:
        cloud_settings(written() | {name: value})
    assert caught.value.field == f"cloud.{name}"
    assert caught.value.mend


def test_a_setting_that_there_is_not_is_refused_with_the_nearest() -> None:
    with pytest.raises(InvalidSetting, match="max_instances"):
        cloud_settings(written() | {"max_instance": 3})
    with pytest.raises(InvalidSetting):
        cloud_settings(None)
    with pytest.raises(InvalidSetting):
        cloud_settings(written() | {"boot": 0})


def test_what_is_left_empty_is_the_default() -> None:
    assert cloud_settings(written() | {"idle": None}).policy.idle_ns == 10 * MINUTE_NS
