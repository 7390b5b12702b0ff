"""Amazon EC2, through boto3: ``pip install tidemill[aws]``.

Renting is idempotent twice over: EC2 itself answers a repeated client token with the same instance, and the token is
also a tag, which is looked for first. Nothing is ever ended that does not carry our installation's tag.

Instances insist on version 2 of the metadata service, one hop away; they end, with their disks, when they shut down.
Credentials are boto3's own: environment, files, or the role of the machine that the control plane runs on.

Sources: EC2 API reference (RunInstances, error codes, ensuring idempotency), EC2 user guide (spot interruption
notices).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from functools import cache
from typing import Any, Final

from tidemill.catalog.devices import derived_device, devices, match_device, matches_request
from tidemill.errors import CloudLost, CloudRefused, InvalidSetting, TidemillError
from tidemill.model.cloud import (
    Billing,
    Instance,
    InstanceState,
    InterruptionNotice,
    Market,
    NoCapacity,
    Offer,
    ProvisionRequest,
)
from tidemill.ports import ProvisionerCapabilities
from tidemill.units import MILLI, MINUTE_NS, SECOND_NS, USD_MICRO

log = logging.getLogger(__name__)
TAG: Final = "tidemill:installation"
TOKEN_TAG: Final = "tidemill:client-token"  # noqa: S105 - the name of a tag
SITE_TAG: Final = "tidemill:site"
NODE_TAG: Final = "tidemill:node"
NOTICE_NS: Final = 2 * MINUTE_NS
"""How long before it takes an instance back EC2 says so."""
_MIB: Final = 1 << 20
_GIB: Final = 1 << 30
_INSTALLATION: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,126}[A-Za-z0-9])?")
_STATES: Final = {
    "pending": InstanceState.PENDING,
    "running": InstanceState.RUNNING,
    "stopping": InstanceState.STOPPED,
    "stopped": InstanceState.STOPPED,
    "shutting-down": InstanceState.ENDING,
    "terminated": InstanceState.GONE,
}
_COUNTRIES: Final = {
    "us-": "USA", "ca-": "CAN", "mx-": "MEX", "sa-east-1": "BRA", "eu-west-1": "IRL", "eu-west-2": "GBR",
    "eu-west-3": "FRA", "eu-central-1": "DEU", "eu-central-2": "CHE", "eu-north-1": "SWE", "eu-south-1": "ITA",
    "eu-south-2": "ESP", "ap-northeast-1": "JPN", "ap-northeast-2": "KOR", "ap-northeast-3": "JPN",
    "ap-south-1": "IND", "ap-south-2": "IND", "ap-southeast-1": "SGP", "ap-southeast-2": "AUS",
    "ap-southeast-3": "IDN", "ap-southeast-4": "AUS", "ap-southeast-5": "MYS", "ap-southeast-7": "THA",
    "ap-east-1": "HKG", "ap-east-2": "TWN", "af-south-1": "ZAF", "me-south-1": "BHR", "me-central-1": "ARE",
    "il-central-1": "ISR", "cn-": "CHN",
}  # fmt: skip
"""In which country regions lie, by the beginning of their names; ISO 3166 alpha-3."""

_NO_CAPACITY: Final = frozenset(
    {
        "InsufficientInstanceCapacity",
        "InsufficientHostCapacity",
        "InsufficientCapacity",
        "InsufficientCapacityOnHost",
        "InsufficientReservedInstanceCapacity",
        "SpotMaxPriceTooLow",
    }
)
_LATER: Final = frozenset(
    {
        "RequestLimitExceeded",
        "Throttling",
        "ThrottlingException",
        "RequestThrottled",
        "ResourceCountExceeded",
        "EC2ThrottledException",
        "InternalError",
        "InternalFailure",
        "ServiceUnavailable",
        "Unavailable",
        "RequestTimeout",
        "IncorrectState",
    }
)
_ACCOUNT: Final = (
    "Give the control plane credentials that may do this, for example by AWS_PROFILE or an instance's role."
)
_REFUSALS: Final = (
    (re.compile(r"AuthFailure|UnauthorizedOperation|InvalidClientTokenId|AccessDenied.*|UnrecognizedClient.*"),
     "credentials", _ACCOUNT),
    (re.compile(r"OptInRequired|PendingVerification|Blocked|AccountDisabled|OperationNotPermitted.*"),
     "account", "Look into the account's console; EC2 does not serve it as it is."),
    (re.compile(r"RequestExpired|SignatureDoesNotMatch|InvalidSignature.*"),
     "credentials", "Check the secret key, and that this machine's clock is right."),
    (re.compile(r".*LimitExceeded|.*QuotaExceeded|MaxSpotInstanceCountExceeded"),
     "quota", "Ask AWS for a higher quota for this family of instances, or lower cloud.max_instances."),
    (re.compile(r"InvalidInstanceType|Unsupported.*|InstanceTypeNotSupported"),
     "cloud.instance_types", "Name types of instance that this region has; aws ec2 describe-instance-type-offerings."),
    (re.compile(r"InvalidAMI.*"), "cloud.image", "Name an image of this region that the account may use: ami-…"),
    (re.compile(r"InvalidSubnet.*|InvalidZone.*|InvalidAvailabilityZone.*"),
     "cloud.subnets", "Name subnets of this region, one for each zone."),
    (re.compile(r"InvalidGroup.*|InvalidSecurityGroup.*|InvalidGroupId.*"),
     "cloud.security_groups", "Name security groups of the subnets' network by id: sg-…"),
    (re.compile(r"InvalidIamInstanceProfile.*|NoSuchEntity"),
     "cloud.instance_profile", "Name an instance profile of the account, or leave it out."),
)  # fmt: skip
"""What a code of EC2 says is wrong: which setting, and how it is mended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ec2Settings:
    """Where and what to rent.

    ``instance_types`` are those that may be rented; ``prices`` gives what one costs on demand, in micro-USD per hour: a
    type without a price is offered on spot only. ``spot_headroom_milli`` is how far above today's price of a spot
    instance we would go on paying, 1250: a quarter more, though never above the on-demand price; it is also the price
    that ceilings count with. ``subnets`` are by zone; without any, the account's default network is used.
    ``endpoint_url`` is for something else that speaks EC2.
    """

    region: str
    image: str
    instance_types: tuple[str, ...]
    prices: Mapping[str, int] = field(default_factory=dict)
    markets: tuple[Market, ...] = (Market.ON_DEMAND, Market.SPOT)
    subnets: tuple[str, ...] = ()
    security_groups: tuple[str, ...] = ()
    instance_profile: str = ""
    disk_bytes: int = 100 * _GIB
    spot_headroom_milli: int = 1_250
    country: str = ""
    endpoint_url: str = ""

    def __post_init__(self) -> None:
        for name in ("region", "image", "instance_types", "markets"):
            if not getattr(self, name):
                raise InvalidSetting("It has to be set.", field=f"cloud.{name}", mend="See docs/cloud.md.")
        if self.spot_headroom_milli < MILLI:
            mend = "Write 1.25 to go on paying up to a quarter more than today's price."
            raise InvalidSetting(
                "The headroom is a factor, 1 or more.", field="cloud.spot_headroom", value=self.spot_headroom_milli,
                mend=mend,
            )  # fmt: skip
        unknown = sorted(set(self.prices) - set(self.instance_types))
        if unknown:
            raise InvalidSetting(
                f"There is a price for {unknown[0]}, which is not among the instance types.",
                field=f"cloud.prices.{unknown[0]}", value=self.prices[unknown[0]],
                mend="Add it to cloud.instance_types, or leave the price out.",
            )  # fmt: skip
        for name, price in self.prices.items():
            if price <= 0:
                mend = "Write US dollars for one hour, such as 3.06."
                raise InvalidSetting("A price is above zero.", field=f"cloud.prices.{name}", value=price, mend=mend)


class Ec2:
    """``ports.Provisioner`` on Amazon EC2. ``installation`` is the value of the tag by which ours are known."""

    def __init__(self, settings: Ec2Settings, *, installation: str) -> None:
        if not _INSTALLATION.fullmatch(installation):
            mend = "Use up to 128 letters, digits, - _ and ."
            raise InvalidSetting("It cannot be a tag.", field="installation", value=installation, mend=mend)
        self._settings = settings
        self._installation = installation
        self._session = _session()
        self._ec2 = self._client("ec2")

    @property
    def capabilities(self) -> ProvisionerCapabilities:
        """By the second, a minute at least."""
        return ProvisionerCapabilities(
            name="ec2",
            spot=Market.SPOT in self._settings.markets,
            notices=True,
            billing=Billing(granularity_ns=SECOND_NS, minimum_ns=MINUTE_NS),
        )

    def scope(self) -> str:
        """The account and the region. Raises: as ``Provisioner`` says."""
        account = _asked(self._client("sts").get_caller_identity)["Account"]
        return f"ec2/{account}/{self._settings.region}"

    # What there is to rent

    def offers(self) -> tuple[Offer, ...]:
        """Every type in every zone that we may rent in, on each market with a known price, by id.

        Raises: as ``Provisioner`` says; an image or a type that is not there is refused.
        """
        settings = self._settings
        architecture = self._architecture()
        kinds = _asked(self._ec2.describe_instance_types, InstanceTypes=list(settings.instance_types))["InstanceTypes"]
        zones = self._zones()
        spot = self._spot_prices() if Market.SPOT in settings.markets else {}
        found: list[Offer] = []
        for kind in kinds:
            if architecture not in kind.get("ProcessorInfo", {}).get("SupportedArchitectures", [architecture]):
                raise CloudRefused(
                    f"{settings.image} is for {architecture}, and {kind['InstanceType']} is not.",
                    field="cloud.image", value=settings.image, mend="Name an image for the processors of these types.",
                )  # fmt: skip
            for zone in sorted(zones.get(kind["InstanceType"], ())):
                found += self._offers_of(kind, zone, spot.get((kind["InstanceType"], zone), 0))
        return tuple(sorted(found, key=lambda offer: offer.id))

    def _offers_of(self, kind: Mapping[str, Any], zone: str, spot_micro: int) -> Iterable[Offer]:
        settings, name = self._settings, kind["InstanceType"]
        on_demand = settings.prices.get(name, 0)
        usable = set(kind.get("SupportedUsageClasses", ["on-demand"]))
        if on_demand and Market.ON_DEMAND in settings.markets and "on-demand" in usable:
            yield self._offer(kind, zone, Market.ON_DEMAND, on_demand, on_demand)
        if spot_micro and "spot" in usable:
            most = -(-spot_micro * settings.spot_headroom_milli // MILLI)
            yield self._offer(
                kind, zone, Market.SPOT, spot_micro, max(min(most, on_demand), spot_micro) if on_demand else most
            )

    def _offer(self, kind: Mapping[str, Any], zone: str, market: Market, price: int, most: int) -> Offer:
        model, count, memory = _gpus_of(kind)
        region = self._settings.region
        country = self._settings.country or _country_of(region)
        labels = {"country": country, "region": region, "zone": zone, "instance-type": kind["InstanceType"]}
        labels["market"] = market.value
        return Offer(
            id=f"{kind['InstanceType']}/{zone}/{market}",
            instance_type=kind["InstanceType"],
            region=region,
            zone=zone,
            market=market,
            cpu_milli=kind["VCpuInfo"]["DefaultVCpus"] * MILLI,
            memory_bytes=kind["MemoryInfo"]["SizeInMiB"] * _MIB,
            disk_bytes=self._settings.disk_bytes,
            gpu_model=model,
            gpu_count=count,
            gpu_memory_bytes=memory,
            price_micro_per_hour=price,
            most_micro_per_hour=most,
            labels=tuple(sorted((key, value) for key, value in labels.items() if value)),
        )

    def _architecture(self) -> str:
        images = _asked(self._ec2.describe_images, ImageIds=[self._settings.image])["Images"]
        if not images:
            raise CloudRefused(
                "There is no such image in this region.", field="cloud.image", value=self._settings.image,
                mend="Name an image of this region that the account may use: ami-…",
            )  # fmt: skip
        return str(images[0].get("Architecture", "x86_64"))

    def _zones(self) -> dict[str, set[str]]:
        """The zones in which each type is to be had, of those in which we have a subnet."""
        wanted = {"Name": "instance-type", "Values": list(self._settings.instance_types)}
        subnets = self._subnets()
        zones: dict[str, set[str]] = {}
        for page in self._pages("describe_instance_type_offerings", LocationType="availability-zone", Filters=[wanted]):
            for each in page["InstanceTypeOfferings"]:
                if not subnets or each["Location"] in subnets:
                    zones.setdefault(each["InstanceType"], set()).add(each["Location"])
        return zones

    def _subnets(self) -> dict[str, str]:
        """Our subnets by zone, the first of each."""
        if not self._settings.subnets:
            return {}
        found = _asked(self._ec2.describe_subnets, SubnetIds=list(self._settings.subnets))["Subnets"]
        zone_of = {each["SubnetId"]: each["AvailabilityZone"] for each in found}
        return {zone_of[subnet]: subnet for subnet in reversed(self._settings.subnets)}

    def _spot_prices(self) -> dict[tuple[str, str], int]:
        """What spot instances cost now, in micro-USD per hour, by type and zone."""
        newest: dict[tuple[str, str], tuple[datetime, int]] = {}
        asked = {
            "InstanceTypes": list(self._settings.instance_types),
            "ProductDescriptions": ["Linux/UNIX"],
            "StartTime": datetime.now(UTC),
        }
        for page in self._pages("describe_spot_price_history", **asked):
            for each in page["SpotPriceHistory"]:
                key = each["InstanceType"], each["AvailabilityZone"]
                seen = each["Timestamp"], _micro(each["SpotPrice"])
                newest[key] = max(newest.get(key, seen), seen)
        return {key: micro for key, (_, micro) in newest.items() if micro > 0}

    # Renting and ending

    def provision(self, request: ProvisionRequest) -> Instance | NoCapacity:
        """The instance of that client token, rented now or before. Raises: as ``Provisioner`` says."""
        known = self._of_token(request.client_token)
        if known is not None:
            return known
        try:
            answer = _asked(self._ec2.run_instances, **self._order(request))
        except _NoCapacityError as error:
            return NoCapacity(offer_id=request.offer.id, detail=error.detail)
        except CloudRefused as error:
            if error.data.get("code") != "IdempotentParameterMismatch":
                raise
            # The token was used before with another request, so its instance is there though the list is behind.
            known = self._of_token(request.client_token)
            if known is None:
                raise CloudLost(
                    "EC2 knows the client token and does not list its instance yet.",
                    field="client_token",
                    value=request.client_token,
                ) from error
            return known
        return _instance(answer["Instances"][0])

    def release(self, instance_id: str) -> None:
        """Have an instance of ours ended; nothing happens to one that is not. Raises: as ``Provisioner`` says."""
        if not any(self._find({"Name": "instance-id", "Values": [instance_id]})):
            return
        try:
            _asked(self._ec2.terminate_instances, InstanceIds=[instance_id])
        except CloudRefused as error:
            if not str(error.data.get("code", "")).startswith("InvalidInstanceID"):
                raise

    def instances(self) -> tuple[Instance, ...]:
        """Every instance with our tag that EC2 lists, by id; those that ended for about an hour after."""
        return tuple(sorted((_instance(each) for each in self._find()), key=lambda one: one.id))

    def interruptions(self) -> tuple[InterruptionNotice, ...]:
        """Our spot instances that EC2 has marked to take back, as the state of their requests tells."""
        ours = {one.id for one in self.instances() if one.market is Market.SPOT}
        if not ours:
            return ()
        found: list[InterruptionNotice] = []
        for page in self._pages(
            "describe_spot_instance_requests", Filters=[{"Name": "state", "Values": ["active", "closed"]}]
        ):
            for each in page["SpotInstanceRequests"]:
                status = each.get("Status", {})
                if each.get("InstanceId") in ours and str(status.get("Code", "")).startswith("marked-for-"):
                    marked = status.get("UpdateTime") or datetime.now(UTC)
                    found.append(
                        InterruptionNotice(
                            instance_id=each["InstanceId"],
                            ends_ns=_ns(marked) + NOTICE_NS,
                            detail=str(status.get("Code")),
                        )
                    )
        return tuple(sorted(found, key=lambda notice: notice.instance_id))

    def _order(self, request: ProvisionRequest) -> dict[str, Any]:
        """The arguments of RunInstances."""
        settings, offer = self._settings, request.offer
        tags = {"Name": request.node_name, TOKEN_TAG: request.client_token, SITE_TAG: request.site}
        tags |= dict(request.tags) | {NODE_TAG: request.node_name, TAG: self._installation}
        tagged = [{"Key": key, "Value": value} for key, value in sorted(tags.items())]
        kinds = ["instance", "volume"] + ["spot-instances-request"] * (offer.market is Market.SPOT)
        order: dict[str, Any] = {
            "ImageId": settings.image,
            "InstanceType": offer.instance_type,
            "MinCount": 1,
            "MaxCount": 1,
            "ClientToken": request.client_token,
            "UserData": request.user_data,
            "InstanceInitiatedShutdownBehavior": "terminate",
            "MetadataOptions": {
                "HttpEndpoint": "enabled",
                "HttpTokens": "required",
                "HttpPutResponseHopLimit": 1,
                "InstanceMetadataTags": "disabled",
            },
            "Placement": {"AvailabilityZone": offer.zone},
            "BlockDeviceMappings": [self._disk()],
            "TagSpecifications": [{"ResourceType": kind, "Tags": tagged} for kind in kinds],
        }
        if subnet := self._subnets().get(offer.zone):
            order["SubnetId"] = subnet
        if settings.security_groups:
            order["SecurityGroupIds"] = list(settings.security_groups)
        if settings.instance_profile:
            order["IamInstanceProfile"] = {"Name": settings.instance_profile}
        if offer.market is Market.SPOT:
            order["InstanceMarketOptions"] = {
                "MarketType": "spot",
                "SpotOptions": {
                    "SpotInstanceType": "one-time",
                    "InstanceInterruptionBehavior": "terminate",
                    "MaxPrice": f"{Decimal(offer.most_micro_per_hour) / USD_MICRO:f}",
                },
            }
        return order

    def _disk(self) -> dict[str, Any]:
        """The first disk, by the name that the image gives it."""
        images = _asked(self._ec2.describe_images, ImageIds=[self._settings.image])["Images"]
        name = images[0].get("RootDeviceName", "/dev/sda1") if images else "/dev/sda1"
        size = -(-self._settings.disk_bytes // _GIB)
        ebs = {"VolumeSize": size, "VolumeType": "gp3", "DeleteOnTermination": True, "Encrypted": True}
        return {"DeviceName": name, "Ebs": ebs}

    def _of_token(self, token: str) -> Instance | None:
        """The instance rented under a client token: of several, which EC2 rules out, the oldest."""
        found = [_instance(each) for each in self._find({"Name": f"tag:{TOKEN_TAG}", "Values": [token]})]
        return min(found, key=lambda one: (one.launched_ns, one.id), default=None)

    def _find(self, *filters: Mapping[str, Any]) -> Iterable[Mapping[str, Any]]:
        ours = {"Name": f"tag:{TAG}", "Values": [self._installation]}
        for page in self._pages("describe_instances", Filters=[ours, *filters]):
            for reservation in page["Reservations"]:
                yield from reservation["Instances"]

    # Talking to EC2

    def _client(self, service: str) -> Any:
        from botocore.config import Config

        config = Config(
            connect_timeout=5,
            read_timeout=60,
            retries={"total_max_attempts": 1, "mode": "standard"},
            user_agent_extra="tidemill",
        )
        url = self._settings.endpoint_url or None
        try:
            return self._session.client(service, region_name=self._settings.region, endpoint_url=url, config=config)
        except Exception as error:
            mend = "Write the name of a region, such as eu-central-1."
            raise InvalidSetting(str(error), field="cloud.region", value=self._settings.region, mend=mend) from error

    def _pages(self, operation: str, **given: Any) -> Iterable[Mapping[str, Any]]:
        pages = iter(self._ec2.get_paginator(operation).paginate(**given))
        while (page := _asked(next, pages, None)) is not None:
            yield page


class _NoCapacityError(CloudLost):
    """There is none now; becomes a value before anybody else sees it."""


def _session() -> Any:
    """A session of its own, with credentials of its own; the descriptions of services, which are large, are shared."""
    try:
        import boto3
        import botocore.session
    except ImportError as error:
        raise InvalidSetting(
            "boto3 is needed to rent machines from AWS.", field="cloud.vendor", value="ec2",
            mend="Install it with: pip install 'tidemill[aws]'",
        ) from error  # fmt: skip
    core = botocore.session.get_session()
    core.register_component("data_loader", _descriptions())
    return boto3.session.Session(botocore_session=core)


@cache
def _descriptions() -> Any:
    from botocore.loaders import create_loader

    return create_loader()


def _asked(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
    """The answer of a call to AWS. Raises: CloudRefused, CloudLost, and when there is none to rent our own."""
    from botocore import exceptions

    try:
        return call(*given, **named)
    except exceptions.ClientError as error:
        raise _told(error.response) from error
    except (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError,
            exceptions.ProfileNotFound, exceptions.TokenRetrievalError) as error:  # fmt: skip
        raise CloudRefused(f"{error}.".replace("..", "."), field="credentials", mend=_ACCOUNT) from error
    except (exceptions.ParamValidationError, exceptions.UnknownServiceError) as error:
        raise CloudRefused(str(error), field="cloud") from error
    except exceptions.BotoCoreError as error:
        raise CloudLost(f"AWS could not be reached: {error}") from error


def _told(response: Mapping[str, Any]) -> TidemillError:
    """What an error of EC2 means to us."""
    code = str(response.get("Error", {}).get("Code", ""))
    said = str(response.get("Error", {}).get("Message", ""))
    status = int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    detail = f"EC2 says {code}: {said}"
    if code in _NO_CAPACITY:
        return _NoCapacityError(detail)
    if code in _LATER or status >= 500 or status == 429:
        return CloudLost(detail, code=code)
    for pattern, named, mend in _REFUSALS:
        if pattern.fullmatch(code):
            return CloudRefused(detail, field=named, mend=mend, code=code)
    return CloudRefused(detail, field="cloud", mend="See EC2's list of error codes.", code=code)


def _instance(each: Mapping[str, Any]) -> Instance:
    tags = {tag["Key"]: tag["Value"] for tag in each.get("Tags", ())}
    reason = each.get("StateReason", {}).get("Message") or each.get("StateTransitionReason", "")
    return Instance(
        id=each["InstanceId"],
        state=_STATES.get(each["State"]["Name"], InstanceState.PENDING),
        instance_type=each["InstanceType"],
        zone=each.get("Placement", {}).get("AvailabilityZone", ""),
        market=Market.SPOT if each.get("InstanceLifecycle") == "spot" else Market.ON_DEMAND,
        launched_ns=_ns(each["LaunchTime"]),
        client_token=tags.get(TOKEN_TAG, ""),
        site=tags.get(SITE_TAG, ""),
        node_name=tags.get(NODE_TAG, ""),
        address=each.get("PrivateIpAddress", "") or "",
        detail=reason or "",
    )


def _gpus_of(kind: Mapping[str, Any]) -> tuple[str, int, int]:
    """The catalog's name of an instance type's GPUs, how many, and bytes of memory of one. ``("", 0, 0)``: none."""
    gpus = kind.get("GpuInfo", {}).get("Gpus", ())
    if not gpus:
        return "", 0, 0
    name, memory = str(gpus[0]["Name"]), int(gpus[0]["MemoryInfo"]["SizeInMiB"]) * _MIB
    count = sum(int(each.get("LogicalGpuCount") or each["Count"]) for each in gpus)
    spec = match_device(name, memory)
    if spec is None:
        # EC2 says A100 and means the module on a board with NVLink
        near = [each for each in devices() if matches_request(each.model, name)]
        near.sort(key=lambda each: (abs(each.memory_bytes - memory), "SXM" not in each.model, each.model))
        spec = near[0] if near else derived_device(name, memory)
    return spec.model, count, spec.memory_bytes


def _country_of(region: str) -> str:
    return next((country for front, country in _COUNTRIES.items() if region.startswith(front)), "")


def _micro(price: str) -> int:
    return int((Decimal(price) * USD_MICRO).to_integral_value(ROUND_CEILING))


def _ns(instant: datetime) -> int:
    return int(instant.timestamp()) * SECOND_NS
