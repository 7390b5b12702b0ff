"""What a token took: the ledger's lines of a service's replicas, over the tokens that they answered with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from tidemill.model.ids import WorkloadId
from tidemill.model.ledger import Evidence, LedgerTotals, ServedTotals

_THOUSAND = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """One model's tokens, and what its replicas took from their start on, idle time among it."""

    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    amount_micro: int
    energy_mj: int
    carbon_mg: int
    energy_evidence: Evidence

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens together."""
        return self.prompt_tokens + self.completion_tokens

    def per_thousand(self, amount: int) -> int:
        """``amount`` for each thousand tokens, rounded to the nearest; zero when there were none."""
        return (amount * _THOUSAND * 2 + self.tokens) // (2 * self.tokens) if self.tokens else 0


def model_costs(served: Sequence[ServedTotals], totals: Mapping[WorkloadId, LedgerTotals]) -> tuple[ModelCost, ...]:
    """By model, in order, what it took; a workload of several models is shared out by their tokens, whole.

    >>> it = ServedTotals(workload_id=WorkloadId("w"), model="m", requests=1, prompt_tokens=3, completion_tokens=1)
    >>> took = LedgerTotals(
    ...     held_milli_ns=(), amount_micro=8, energy_mj=40, carbon_mg=0, evidence=Evidence.MEASURED, lines=1
    ... )
    >>> [cost] = model_costs([it], {WorkloadId("w"): took})
    >>> cost.per_thousand(cost.amount_micro), cost.per_thousand(cost.energy_mj)
    (2000, 10000)
    """
    shares: dict[str, list[tuple[ServedTotals, tuple[int, int, int], Evidence]]] = {}
    for workload_id in sorted({one.workload_id for one in served}):
        mine = sorted((one for one in served if one.workload_id == workload_id), key=lambda one: one.model)
        took = totals.get(workload_id)
        whole = (took.amount_micro, took.energy_mj, took.carbon_mg) if took is not None else (0, 0, 0)
        evidence = took.evidence if took is not None else Evidence.ESTIMATED
        weights = [one.prompt_tokens + one.completion_tokens for one in mine]
        if not any(weights):
            weights = [1] * len(mine)
        parts = [_shared(amount, weights) for amount in whole]
        for one, amount_micro, energy_mj, carbon_mg in zip(mine, *parts, strict=True):
            shares.setdefault(one.model, []).append((one, (amount_micro, energy_mj, carbon_mg), evidence))
    return tuple(
        ModelCost(
            model=model,
            requests=sum(one.requests for one, _, _ in told),
            prompt_tokens=sum(one.prompt_tokens for one, _, _ in told),
            completion_tokens=sum(one.completion_tokens for one, _, _ in told),
            amount_micro=sum(part[0] for _, part, _ in told),
            energy_mj=sum(part[1] for _, part, _ in told),
            carbon_mg=sum(part[2] for _, part, _ in told),
            energy_evidence=Evidence.MEASURED
            if all(evidence is Evidence.MEASURED for _, _, evidence in told)
            else Evidence.ESTIMATED,
        )
        for model, told in sorted(shares.items())
    )


def _shared(amount: int, weights: Sequence[int]) -> list[int]:
    """The amount by weights: what is left by rounding goes to the first ones, so that the parts add up to it."""
    whole = sum(weights)
    ends = [0]
    for weight in weights:
        ends.append(ends[-1] + weight)
    return [amount * after // whole - amount * before // whole for before, after in pairwise(ends)]
