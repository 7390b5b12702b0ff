"""EC2 keeps the contract of a provisioner, on moto's server; and the contract catches provisioners that do not."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from tests.aws import REGION, Aws, gpu_offer
from tidemill.clouds.booting import BootSettings, boot_script
from tidemill.clouds.ec2 import NODE_TAG, SITE_TAG, TAG, TOKEN_TAG, Ec2, Ec2Settings
from tidemill.errors import CloudLost, CloudRefused, InvalidSetting
from tidemill.model.cloud import Instance, InstanceState, Market, NoCapacity, ProvisionRequest
from tidemill.testing.provisioner import CHECKS, ProvisionerBench, check_provisioner
from tidemill.units import MINUTE_NS


@pytest.fixture(scope="module")
def account() -> Iterator[Aws]:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ACCESS_KEY_ID", "test")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "test")
        environment.setenv("MOTO_EC2_ENABLE_INSTANCE_TYPE_VALIDATION", "true")
        environment.setattr("moto.settings.EC2_ENABLE_INSTANCE_TYPE_VALIDATION", True)
        aws = Aws()
        yield aws
        aws.close()


@pytest.fixture
def aws(account: Aws) -> Aws:
    account.reset()
    return account


def bench_of(aws: Aws, kind: type[Ec2] = Ec2) -> ProvisionerBench:
    def make(installation: str) -> Ec2:
        return kind(aws.settings(), installation=installation)

    def refused(request: ProvisionRequest) -> ProvisionRequest:
        return replace(request, offer=replace(request.offer, instance_type="x9.nowhere"))

    return ProvisionerBench(
        make=make, stranger=aws.stranger, end=aws.end, alive=aws.alive, refused=refused, patience_s=1.0
    )


def test_ec2_keeps_the_contract(aws: Aws) -> None:
    check_provisioner(bench_of(aws))
    assert not aws.living(), "the checks end what they rented"


# -- planted bugs -----------------------------------------------------------------------------------------------------


class RentsEachTime(Ec2):
    """Takes no notice of the client token."""

    def _of_token(self, token: str) -> Instance | None:
        return None


class RentsAgainAfterTheEnd(Ec2):
    """Looks only among what is there."""

    def _of_token(self, token: str) -> Instance | None:
        found = super()._of_token(token)
        return found if found is not None and found.state is not InstanceState.GONE else None


class ListsEverything(Ec2):
    """Forgets to filter by the installation."""

    def _find(self, *filters: Any) -> Any:
        for page in self._pages("describe_instances", Filters=list(filters)):
            for reservation in page["Reservations"]:
                yield from reservation["Instances"]


class EndsAnything(Ec2):
    """Ends whatever it is told to."""

    def release(self, instance_id: str) -> None:
        if instance_id.startswith("i-") and instance_id != "i-0123456789abcdef0":
            self._ec2.terminate_instances(InstanceIds=[instance_id])


class StumblesOverTheUnknown(Ec2):
    def release(self, instance_id: str) -> None:
        if instance_id not in {one.id for one in self.instances()}:
            raise CloudRefused("no such instance")
        super().release(instance_id)


class NeverEnds(Ec2):
    def release(self, instance_id: str) -> None:
        pass


class RemembersWhatItRented(Ec2):
    """Lists from its own memory."""

    def __init__(self, settings: Ec2Settings, *, installation: str) -> None:
        super().__init__(settings, installation=installation)
        self._mine: dict[str, Instance] = {}

    def provision(self, request: ProvisionRequest) -> Instance | NoCapacity:
        made = super().provision(request)
        if isinstance(made, Instance):
            self._mine[made.id] = made
        return made

    def release(self, instance_id: str) -> None:
        super().release(instance_id)
        self._mine.pop(instance_id, None)

    def instances(self) -> tuple[Instance, ...]:
        return tuple(self._mine.values())


class LosesTheName(Ec2):
    def _order(self, request: ProvisionRequest) -> dict[str, Any]:
        return super()._order(replace(request, node_name="machine"))


class IgnoresTheMarket(Ec2):
    def _order(self, request: ProvisionRequest) -> dict[str, Any]:
        order = super()._order(request)
        order.pop("InstanceMarketOptions", None)
        return order


class OneTokenForAll(Ec2):
    def _of_token(self, token: str) -> Instance | None:
        return next((one for one in self.instances() if one.state is not InstanceState.GONE), None)


class CallsARefusalNoCapacity(Ec2):
    def provision(self, request: ProvisionRequest) -> Instance | NoCapacity:
        try:
            return super().provision(request)
        except CloudRefused:
            return NoCapacity(offer_id=request.offer.id)


class OffersTheSameTwice(Ec2):
    def offers(self) -> Any:
        return tuple(replace(offer, id=offer.instance_type) for offer in super().offers())


class ForgetsWhereItIs(Ec2):
    def scope(self) -> str:
        return f"ec2/{self._installation}"


BUGS = (
    (RentsEachTime, "check_a_client_token_rents_once"),
    (RentsAgainAfterTheEnd, "check_a_token_is_not_used_again_after_the_end"),
    (ListsEverything, "check_what_is_not_ours_is_left_alone"),
    (EndsAnything, "check_what_is_not_ours_is_left_alone"),
    (StumblesOverTheUnknown, "check_release_ends_and_is_harmless_twice"),
    (NeverEnds, "check_release_ends_and_is_harmless_twice"),
    (RemembersWhatItRented, "check_the_list_is_the_clouds_own"),
    (LosesTheName, "check_an_instance_is_listed_with_what_it_is_for"),
    (IgnoresTheMarket, "check_spot_is_rented_as_spot"),
    (OneTokenForAll, "check_another_token_rents_another"),
    (CallsARefusalNoCapacity, "check_what_can_never_be_is_refused"),
    (OffersTheSameTwice, "check_offers_can_be_told_apart_and_have_prices"),
    (ForgetsWhereItIs, "check_the_scope_stays"),
)


@pytest.mark.parametrize(("kind", "check"), BUGS)
def test_each_check_catches_its_bug(aws: Aws, kind: type[Ec2], check: str) -> None:
    caught = next(one for one in CHECKS if one.__name__ == check)
    with pytest.raises((AssertionError, CloudRefused)):
        caught(bench_of(aws, kind))


def test_every_check_has_a_bug_that_it_catches() -> None:
    assert {check for _, check in BUGS} == {check.__name__ for check in CHECKS}


# -- what is asked of EC2 ---------------------------------------------------------------------------------------------


def request_for(aws: Aws, market: Market = Market.ON_DEMAND, **changes: Any) -> tuple[Ec2, ProvisionRequest]:
    provisioner = aws.provisioner()
    offer = gpu_offer(provisioner.offers(), market)
    known: dict[str, Any] = {
        "client_token": "ren_1",
        "offer": offer,
        "site": "burst",
        "node_name": "burst-1",
        "user_data": "#!/bin/sh\n",
    }
    return provisioner, ProvisionRequest(**(known | changes))


def test_an_offer_says_what_the_machine_will_be(aws: Aws) -> None:
    offers = aws.provisioner().offers()
    assert {offer.id for offer in offers} >= {"g4dn.xlarge/eu-west-1a/on_demand", "g4dn.xlarge/eu-west-1a/spot"}
    assert not [one for one in offers if one.instance_type == "m5.large" and one.market is Market.ON_DEMAND], "no price"
    gpu = gpu_offer(offers)
    assert (gpu.gpu_model, gpu.gpu_count, gpu.gpu_memory_bytes >> 30) == ("T4", 1, 16)
    assert (gpu.cpu_milli, gpu.memory_bytes >> 30, gpu.disk_bytes >> 30) == (4_000, 16, 100)
    assert (gpu.price_micro_per_hour, gpu.most_micro_per_hour) == (587_000, 587_000)
    assert dict(gpu.labels) == {
        "country": "IRL", "region": REGION, "zone": gpu.zone, "instance-type": "g4dn.xlarge", "market": "on_demand",
    }  # fmt: skip
    spot = gpu_offer(offers, Market.SPOT)
    assert (spot.price_micro_per_hour, spot.most_micro_per_hour) == (10, 13)


def test_names_of_gpus_are_the_catalogs(aws: Aws) -> None:
    types = ("g5.xlarge", "p4d.24xlarge", "p4de.24xlarge", "g6.xlarge", "g6e.xlarge")
    offers = aws.provisioner(region="us-east-1", instance_types=types, prices=dict.fromkeys(types, 1)).offers()
    found = {offer.instance_type: (offer.gpu_model, offer.gpu_count, offer.gpu_memory_bytes >> 30) for offer in offers}
    expected = {
        "g5.xlarge": ("A10G", 1, 24),
        "p4d.24xlarge": ("A100-40GB-SXM", 8, 40),
        "p4de.24xlarge": ("A100-80GB-SXM", 8, 80),
        "g6.xlarge": ("L4", 1, 24),
        "g6e.xlarge": ("L40S", 1, 48),
    }
    assert found == expected


def test_a_machine_is_guarded_tagged_and_ends_with_its_disk(aws: Aws) -> None:
    provisioner, request = request_for(aws)
    made = provisioner.provision(request)
    assert isinstance(made, Instance)
    seen = aws.described(made.id)
    metadata = seen["MetadataOptions"]
    assert (metadata["HttpTokens"], metadata["HttpPutResponseHopLimit"]) == ("required", 1)
    tags = {tag["Key"]: tag["Value"] for tag in seen["Tags"]}
    assert tags == {TAG: "check", TOKEN_TAG: "ren_1", SITE_TAG: "burst", NODE_TAG: "burst-1", "Name": "burst-1"}
    assert aws.attribute(made.id, "instanceInitiatedShutdownBehavior") == "terminate"
    assert base64.b64decode(aws.attribute(made.id, "userData")) == b"#!/bin/sh\n"
    disk = aws.ec2.describe_volumes()["Volumes"][0]
    assert (disk["Size"], disk["Encrypted"], disk["VolumeType"]) == (100, True, "gp3")
    assert {tag["Key"] for tag in disk["Tags"]} >= {TAG}
    sent = next(form for action, form in aws.door.calls if action == "RunInstances")
    assert sent["ClientToken"] == ["ren_1"]
    assert sent["BlockDeviceMapping.1.Ebs.DeleteOnTermination"] == ["true"]


def test_a_spot_machine_is_never_paid_more_than_its_offer_says(aws: Aws) -> None:
    provisioner, request = request_for(aws, Market.SPOT)
    assert isinstance(provisioner.provision(request), Instance)
    sent = next(form for action, form in aws.door.calls if action == "RunInstances")
    assert sent["InstanceMarketOptions.SpotOptions.MaxPrice"] == ["0.000013"]
    assert sent["InstanceMarketOptions.SpotOptions.SpotInstanceType"] == ["one-time"]
    assert sent["InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior"] == ["terminate"]


def test_only_zones_with_a_subnet_are_offered_and_it_is_used(aws: Aws) -> None:
    subnets = aws.ec2.describe_subnets()["Subnets"]
    subnet = next(each for each in subnets if each["AvailabilityZone"] == "eu-west-1b")
    provisioner = aws.provisioner(subnets=(subnet["SubnetId"],))
    offers = provisioner.offers()
    assert {offer.zone for offer in offers} == {"eu-west-1b"}
    _, request = request_for(aws, offer=gpu_offer(offers))
    made = provisioner.provision(request)
    assert isinstance(made, Instance)
    assert aws.described(made.id)["SubnetId"] == subnet["SubnetId"]


def test_what_ec2_has_marked_to_take_back_is_told(aws: Aws) -> None:
    """moto makes no spot request for RunInstances, so the state of one is written into moto's own memory."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.ec2.models import ec2_backends

    provisioner, request = request_for(aws, Market.SPOT)
    made = provisioner.provision(request)
    assert isinstance(made, Instance)
    assert provisioner.interruptions() == ()
    aws.ec2.request_spot_instances(
        SpotPrice="1", LaunchSpecification={"ImageId": aws.image, "InstanceType": "g4dn.xlarge"}
    )
    backend = ec2_backends[DEFAULT_ACCOUNT_ID][REGION]
    asked = next(iter(backend.spot_instance_requests.values()))
    asked.instance = backend.get_instance(made.id)
    assert provisioner.interruptions() == ()
    marked = datetime(2030, 1, 1, tzinfo=UTC)
    kind = type(asked)
    known = kind.status
    try:
        kind.status = property(lambda _: {"Code": "marked-for-termination", "Message": "", "UpdateTime": marked})
        (notice,) = provisioner.interruptions()
    finally:
        kind.status = known
    assert (notice.instance_id, notice.detail) == (made.id, "marked-for-termination")
    assert notice.ends_ns == int(marked.timestamp()) * 1_000_000_000 + 2 * MINUTE_NS


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_an_answer_that_is_lost_rents_nothing_twice(aws: Aws) -> None:
    provisioner, request = request_for(aws)
    aws.door.faults["RunInstances"] = ["after"]
    with pytest.raises(CloudLost):
        provisioner.provision(request)
    assert len(aws.living()) == 1
    made = aws.provisioner().provision(request)
    assert isinstance(made, Instance)
    assert aws.living() == {made.id}


def test_a_line_that_breaks_before_anything_is_done_can_be_tried_again(aws: Aws) -> None:
    provisioner, request = request_for(aws)
    for action in ("DescribeInstances", "RunInstances"):
        aws.door.faults[action] = ["before"]
        with pytest.raises(CloudLost):
            provisioner.provision(request)
        assert not aws.living()
    assert isinstance(provisioner.provision(request), Instance)


def test_a_token_that_was_used_with_another_request_gives_what_is_there(aws: Aws) -> None:
    provisioner, request = request_for(aws)
    aws.door.faults["RunInstances"] = ["IdempotentParameterMismatch"]
    with pytest.raises(CloudLost, match="client token"):
        provisioner.provision(request)
    made = provisioner.provision(request)
    assert isinstance(made, Instance)
    assert provisioner.provision(replace(request, user_data="#!/bin/sh\n# another token\n")) == replace(
        made, state=InstanceState.RUNNING
    )


@pytest.mark.parametrize("code", ["RequestLimitExceeded", "Throttling", "InternalError", "ServiceUnavailable"])
def test_being_put_off_is_lost_and_is_not_retried_here(aws: Aws, code: str) -> None:
    provisioner, request = request_for(aws)
    aws.door.faults["RunInstances"] = [code]
    with pytest.raises(CloudLost, match=code):
        provisioner.provision(request)
    assert aws.door.count("RunInstances") == 1


@pytest.mark.parametrize("code", ["InsufficientInstanceCapacity", "SpotMaxPriceTooLow"])
def test_no_capacity_is_a_value(aws: Aws, code: str) -> None:
    provisioner, request = request_for(aws)
    aws.door.faults["RunInstances"] = [code]
    found = provisioner.provision(request)
    assert isinstance(found, NoCapacity)
    assert found.offer_id == request.offer.id
    assert code in found.detail


@pytest.mark.parametrize(
    ("code", "field"),
    [
        ("VcpuLimitExceeded", "quota"),
        ("InstanceLimitExceeded", "quota"),
        ("MaxSpotInstanceCountExceeded", "quota"),
        ("AuthFailure", "credentials"),
        ("UnauthorizedOperation", "credentials"),
        ("RequestExpired", "credentials"),
        ("PendingVerification", "account"),
        ("Unsupported", "cloud.instance_types"),
        ("InvalidAMIID.NotFound", "cloud.image"),
        ("InvalidSubnetID.NotFound", "cloud.subnets"),
        ("InvalidGroup.NotFound", "cloud.security_groups"),
        ("SomethingQuiteNew", "cloud"),
    ],
)
def test_a_refusal_names_what_is_wrong_and_how_to_mend_it(aws: Aws, code: str, field: str) -> None:
    provisioner, request = request_for(aws)
    aws.door.faults["RunInstances"] = [code]
    with pytest.raises(CloudRefused, match=code) as caught:
        provisioner.provision(request)
    assert caught.value.field == field
    assert caught.value.mend


def test_a_type_or_an_image_that_is_not_there_is_refused(aws: Aws) -> None:
    with pytest.raises(CloudRefused) as caught:
        aws.provisioner(instance_types=("x9.nowhere",), prices={}).offers()
    assert caught.value.field == "cloud.instance_types"
    with pytest.raises(CloudRefused) as caught:
        aws.provisioner(image="ami-0000000000000dead").offers()
    assert caught.value.field == "cloud.image"


def test_without_credentials_it_says_so(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    with pytest.raises(CloudRefused) as caught:
        aws.provisioner().instances()
    assert caught.value.field == "credentials"


def test_without_boto3_it_says_which_extra_to_install(aws: Aws, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(InvalidSetting, match=r"pip install 'tidemill\[aws\]'"):
        aws.provisioner()


def test_a_cloud_that_is_down_is_lost(aws: Aws) -> None:
    nobody = Ec2(aws.settings(endpoint_url="http://127.0.0.1:9"), installation="check")
    for call in (nobody.offers, nobody.instances, nobody.scope, lambda: nobody.release("i-1")):
        with pytest.raises(CloudLost):
            call()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"region": ""}, "cloud.region"),
        ({"image": ""}, "cloud.image"),
        ({"instance_types": (), "prices": {}}, "cloud.instance_types"),
        ({"prices": {"p5.48xlarge": 1}}, "cloud.prices.p5.48xlarge"),
        ({"prices": {"g4dn.xlarge": 0}}, "cloud.prices.g4dn.xlarge"),
        ({"spot_headroom_milli": 900}, "cloud.spot_headroom"),
    ],
)
def test_settings_that_cannot_be_used_are_named(aws: Aws, changes: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidSetting) as caught:
        aws.settings(**changes)
    assert caught.value.field == field
    assert caught.value.mend


# -- the script that machines boot with -------------------------------------------------------------------------------


def test_the_script_joins_and_has_no_secret_but_the_token(tmp_path: Path) -> None:
    said = tmp_path / "said"
    tidemill = tmp_path / "tidemill"
    tidemill.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" "token $TIDEMILL_JOIN_TOKEN" > {said}\n')
    tidemill.chmod(0o755)
    script = boot_script(
        BootSettings(address="https://head.example:7070"),
        token="tm_join_it's",
        node_name="burst-1",
        labels=[("region", "eu west")],
        taints=["market=spot"],
    )
    subprocess.run(["sh", "-c", script], check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    assert said.read_text().splitlines() == [
        "join", "https://head.example:7070", "--name", "burst-1", "--label", "region=eu west", "--taint", "market=spot",
        "token tm_join_it's",
    ]  # fmt: skip


def test_a_machine_that_cannot_join_ends_itself(tmp_path: Path) -> None:
    for name, does in (("tidemill", "exit 3"), ("shutdown", f'echo "$@" > {tmp_path}/ended')):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    script = boot_script(BootSettings(address="head:7070"), token="t", node_name="n")
    done = subprocess.run(
        ["sh", "-c", script], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True
    )
    assert done.returncode == 3
    assert (tmp_path / "ended").read_text() == "-h now\n"
    assert "could not join" in done.stderr


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        (BootSettings(address=""), "n"),
        (BootSettings(address="--token"), "n"),
        (BootSettings(address="head"), "$(reboot)"),
        (BootSettings(address="head", setup="x" * 20_000), "n"),
    ],
)
def test_a_script_that_cannot_be_is_not_made(settings: BootSettings, name: str) -> None:
    with pytest.raises(InvalidSetting):
        boot_script(settings, token="t", node_name=name)
