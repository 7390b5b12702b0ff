"""Sites, how they join, and what is rented there."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, StringConstraints
from typing_extensions import TypedDict

from tidemill.api.shapes.common import PLAIN_TEXT, Body, Name


class OutpostStateOut(TypedDict):
    """A process at a site that works its engine. ``is_there``: it asked for work a moment ago."""

    id: str
    name: str
    engine: str
    is_there: bool


class LinkOut(TypedDict):
    """The way to another site. ``bits_per_s`` zero: not known."""

    site: str
    latency_ns: int
    bits_per_s: int


class SiteOut(TypedDict):
    """A place with its machines. ``silent`` counts those that cannot be reached; ``lease_ns`` zero: none is given.

    ``prices`` are micro-USD an hour where the site has its own.
    """

    id: str
    name: str
    kind: str
    engine: str
    country: str
    pue: float
    carbon_g_per_kwh: float
    carbon_source: str
    lease_ns: int
    carbon_g_by_hour: list[float]
    prices: dict[str, int]
    tariff_micro_per_kwh: int
    rate_card: str
    links: list[LinkOut]
    nodes: int
    silent: int
    outposts: list[OutpostStateOut]


class RentalOut(TypedDict):
    """A machine that is or was rented. ``cost_micro`` is what it cost, once it is over; ``jobs`` those it is for."""

    id: str
    site: str
    state: str
    machine: str
    instance: str
    type: str
    market: str
    micro_per_hour: int
    cost_micro: int
    cause: str
    jobs: list[str]
    created_at_ns: int
    ended_at_ns: int


class NotRentedOut(TypedDict):
    """A waiting job for which nothing is rented, and why."""

    job: str
    code: str
    sentence: str


class RentingOut(TypedDict):
    """What is rented: as of the last look. ``spent_micro`` is this month's; ``problem`` says why it could not look."""

    items: list[RentalOut]
    next_cursor: str
    spent_micro: int
    not_rented: list[NotRentedOut]
    problem: str


class JoiningOut(TypedDict):
    """A token that lets machines join a site, shown this once.

    ``url`` is there when the API has a certificate; ``fingerprint`` is that one's when no authority vouches for it.
    """

    token: str
    site: str
    expires_at_ns: int
    url: NotRequired[str]
    fingerprint: NotRequired[str]


class JoiningSiteOut(TypedDict):
    """The site that a token is for. ``settings`` are those of the cluster that a machine of its engine joins."""

    site: str
    engine: str
    settings: dict[str, str]


class OutpostOut(TypedDict):
    """An outpost, with the token that is its own from now on."""

    id: str
    name: str
    site: str
    site_id: str
    engine: str
    token: str


class OutpostCallsOut(TypedDict):
    """Calls of the site's engine to carry out, by number. Numbers begin anew with each ``session``."""

    session: str
    calls: list[dict[str, Any]]


class ReportTakenOut(TypedDict):
    """Up to which number what the outpost brought was taken; zero: nothing with a number."""

    taken: int


class LeavingOut(TypedDict):
    """The jobs that run still on machines that leave; ``left`` once there are none."""

    running: list[str]
    left: bool


_Resource = Annotated[str, StringConstraints(max_length=100, pattern=PLAIN_TEXT)]


class SiteIn(Body):
    """A site to add, or what of one is to be described anew; what is left out stays as it is."""

    kind: Literal["onprem", "cloud", "edge"] | None = None
    engine: Literal["local", "ray", "slurm", "kubernetes"] | None = None
    country: Annotated[str, StringConstraints(pattern=r"^([A-Z]{3})?$")] | None = None
    pue: float | None = Field(None, ge=1, lt=100)
    carbon_g_per_kwh: float | None = Field(None, ge=0, lt=1_000_000)
    carbon_by_hour: list[Annotated[float, Field(ge=0, lt=1_000_000)]] | None = Field(
        None, max_length=24, description="24 intensities, by hour of the day in UTC; none: the same all day."
    )
    lease: Annotated[str, StringConstraints(max_length=20, pattern=PLAIN_TEXT)] | None = Field(
        None, description="How long a worker runs on without a word from the control plane, such as 1h; or none."
    )
    prices: (
        dict[
            Annotated[str, StringConstraints(max_length=100, pattern=PLAIN_TEXT)],
            Annotated[float, Field(ge=0, le=1_000_000)],
        ]
        | None
    ) = Field(
        None,
        max_length=1_000,
        description="US dollars an hour by device model, or for cpu, where they differ from the installation's rates.",
    )
    tariff: float | None = Field(
        None, ge=0, lt=1_000, description="US dollars for a kWh, charged on top of the prices; 0: it is in them."
    )


class LinkIn(Body):
    """The way between two sites."""

    latency: Annotated[str, StringConstraints(max_length=20, pattern=PLAIN_TEXT)] = Field(
        "0s", description="There and back, such as 20ms."
    )
    bandwidth: Annotated[str, StringConstraints(max_length=20, pattern=PLAIN_TEXT)] = Field(
        "", description="Such as 1Gbps; not known when left out."
    )


class SiteTokenIn(Body):
    """A token with which machines join a site."""

    expires_in: Annotated[str, StringConstraints(max_length=20, pattern=PLAIN_TEXT)] = "1h"


class LeaveIn(Body):
    """What leaves: that machine, or all of the outpost's."""

    node: Annotated[str, StringConstraints(max_length=100, pattern=PLAIN_TEXT)] = ""


class OutpostIn(Body):
    """An outpost that joins. ``key`` is made by it once and kept, so that joining again is the same outpost."""

    name: Name
    key: Annotated[str, StringConstraints(pattern=r"^[0-9a-z]{16,40}$")]
    engine: Literal["local", "ray", "slurm", "kubernetes"] = "local"
