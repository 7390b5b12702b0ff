"""What the gateway is told, and what it tells."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from tidemill.api.shapes.common import Body
from tidemill.core import buckets
from tidemill.model.spec import MAX_PRICE_MICRO


class FeedOut(TypedDict):
    """Everything that the gateway needs."""

    version: int
    tokens: dict[str, Any]
    routes: dict[str, Any]
    sites: dict[str, Any]
    home: str
    projects: dict[str, Any]


_Name = Annotated[str, Field(max_length=300, pattern=r"^[^\x00]*$")]


class RequestUsageIn(Body):
    """What one request took, as the gateway tells."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{1,32}-[0-9a-f]{1,16}$")]
    at_ns: Annotated[int, Field(ge=0, lt=2**63)]
    project: _Name
    token: _Name
    model: _Name
    workload: _Name
    job: _Name
    prompt_tokens: Annotated[int, Field(ge=0, lt=2**31)]
    completion_tokens: Annotated[int, Field(ge=0, lt=2**31)]
    is_estimated: bool
    user: _Name = ""
    label: _Name = ""
    price: Annotated[
        list[Annotated[int, Field(ge=0, le=MAX_PRICE_MICRO)]],
        Field(min_length=2, max_length=2, description="Micro-USD for a million tokens, in and out."),
    ] = Field([0, 0])


class RulingIn(Body):
    """What a guardrail decided about one request, as the gateway tells."""

    id: Annotated[str, Field(pattern=r"^[0-9a-f]{1,32}-[0-9a-f]{1,16}$")]
    at_ns: Annotated[int, Field(ge=0, lt=2**63)]
    request: _Name
    project: _Name
    token: _Name
    model: _Name
    rule: _Name
    kind: _Name
    stage: _Name
    action: _Name
    found: dict[_Name, Annotated[int, Field(ge=0, lt=2**53)]]


class RulingsIn(Body):
    """What guardrails decided."""

    rulings: list[RulingIn] = Field(max_length=10_000)


class RequestUsagesIn(Body):
    """What requests took."""

    usages: list[RequestUsageIn] = Field(max_length=10_000)


_Count = Annotated[int, Field(ge=0, lt=2**31)]
_Total = Annotated[int, Field(ge=0, lt=2**53)]
_Counts = Annotated[
    dict[Annotated[str, Field(pattern=r"^([0-9]|[1-7][0-9]|8[0-3])$")], _Total], Field(max_length=buckets.COUNT)
]


class FeltIn(Body):
    """What users of a model felt since the gateway began: counts of times by bucket, and tokens of answers.

    Bucket `n` has what took up to 2^(n/4) ms and longer than that of the one before.
    """

    ttft: _Counts
    latency: _Counts
    queue: _Counts
    tokens: _Total


class ModelLoadIn(Body):
    """Requests under way on replicas of a model, and waiting for one; now and then what users felt."""

    in_flight: _Count
    waiting: _Count
    felt: FeltIn | None = None


class ReplicaLoadIn(Body):
    """Requests under way on a replica, whether it gets no more, and what its engine tells of itself."""

    in_flight: _Count
    is_leaving: bool
    queued: _Count | None = None
    running: _Count | None = None
    cache_milli: Annotated[int, Field(ge=0, le=1000)] | None = None
    first_token_ms: _Total | None = None


class VariantLoadIn(Body):
    """What became of requests to a variant of a model since the gateway started; times of answers in buckets."""

    requests: _Total
    errors: _Total
    slow: _Counts = Field({})


class LoadIn(Body):
    """What a gateway has on its hands, by model and by replica's job."""

    worker: _Name
    models: Annotated[dict[_Name, ModelLoadIn], Field(max_length=10_000)]
    replicas: Annotated[dict[_Name, ReplicaLoadIn], Field(max_length=100_000)]
    variants: Annotated[dict[_Name, dict[_Name, VariantLoadIn]], Field(max_length=10_000)] = Field({})


_Amount = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Share = Annotated[
    tuple[_Name, _Name, _Amount, _Amount, _Amount, _Amount, _Amount, _Amount, _Amount, _Amount], Field(strict=False)
]


class SharesIn(Body):
    """What a gateway has of limits, and what it needs. ``number`` grows with each of its calls."""

    gateway: _Name
    number: Annotated[int, Field(ge=0, lt=2**53)]
    shares: Annotated[
        list[_Share],
        Field(
            max_length=1_000_000,
            description="Of each a key's or project's id, a limit's name, when its window began (ns), what is held,"
            " pending, spent in all, spent of late, needed for one request, needed for all, and hoped for.",
        ),
    ]


class SharesOut(TypedDict):
    """What a gateway gets more of limits.

    ``shares`` has of each a key's or project's id, a limit's name, when its window began (ns), what is given, what
    nobody holds, what others hold, and whether others wait for some.
    """

    gateways: int
    shares: list[tuple[str, str, int, int, int, int, bool]]


class EnteredOut(TypedDict):
    """How many of them were not known before."""

    entered: int
