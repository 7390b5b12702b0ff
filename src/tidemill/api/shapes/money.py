"""What was used, what it cost, and what was decided about requests."""

from __future__ import annotations

from typing_extensions import TypedDict


class TokenTotalsOut(TypedDict):
    """Sums over requests to models; ``estimated`` of them did not come to their end.

    What they are not grouped by is empty.
    """

    model: str
    token_id: str
    user: str
    label: str
    requests: int
    estimated: int
    prompt_tokens: int
    completion_tokens: int
    amount_micro: int


class TokenUsageOut(TypedDict):
    """What one request to a model took; ``estimated`` when it did not come to its end. ``amount_pico``: millionths of a
    micro-USD."""

    id: str
    at_ns: int
    project_id: str
    token_id: str
    model: str
    workload_id: str
    job_id: str
    prompt_tokens: int
    completion_tokens: int
    estimated: bool
    user: str
    label: str
    amount_pico: int


class UsageOut(TypedDict):
    """Exact sums over ledger lines. ``held_milli_ns`` maps a resource to milli-units x ns.

    ``amount_micro`` is for machines, ``tokens_amount_micro`` for tokens of requests to models.
    """

    held_milli_ns: dict[str, int]
    device_seconds: dict[str, float]
    amount_micro: int
    currency: str
    energy_mj: int
    energy_evidence: str
    carbon_mg: int
    lines: int
    tokens: list[TokenTotalsOut]
    tokens_amount_micro: int


class ModelCostOut(TypedDict):
    """What the replicas of a model took for the tokens that they answered with, idle time among it."""

    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    amount_micro: int
    energy_mj: int
    energy_evidence: str
    carbon_mg: int
    amount_micro_per_1k_tokens: int
    energy_mj_per_1k_tokens: int
    carbon_mg_per_1k_tokens: int


class ModelCostsOut(TypedDict):
    """Models, in order."""

    items: list[ModelCostOut]


class DecisionOut(TypedDict):
    """What a guardrail decided about a request; ``found`` counts what it found, by label."""

    id: str
    at_ns: int
    request_id: str
    project_id: str
    token_id: str
    model: str
    rule: str
    kind: str
    stage: str
    action: str
    found: dict[str, int]


class LedgerLineOut(TypedDict):
    """One priced interval of use; without a launch, of idle time or of ``others``: work that is not this cloud's."""

    id: str
    node_id: str
    meter: str
    resource: str
    from_ns: int
    to_ns: int
    milli: int
    amount_micro: int
    energy_mj: int
    energy_evidence: str
    carbon_mg: int
    rate_card: str
    included: bool
    others: bool
    launch_id: str
    attempt_id: str
    job_id: str
    project_id: str
