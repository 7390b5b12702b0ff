"""The simulated cloud keeps the contract of a provisioner, with lists that are behind too."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.core.test_bursting import offer
from tidemill.clouds.simulated import SimulatedAccount, SimulatedCloud
from tidemill.model.cloud import Market, ProvisionRequest
from tidemill.testing.provisioner import CHECKS, ProvisionerBench


class PassingTime(SimulatedAccount):
    """An account in which a second passes whenever somebody looks."""

    def listed(self, installation: str) -> tuple:  # type: ignore[type-arg]
        self.now += 1_000_000_000
        return super().listed(installation)


@pytest.mark.parametrize("lag_s", [0, 3])
@pytest.mark.parametrize("check", CHECKS)
def test_contract(check: object, lag_s: int) -> None:
    account = PassingTime(offers=(offer(), offer(market=Market.SPOT)), now=1, lag_ns=lag_s * 1_000_000_000)
    account.now = 10**18

    def stranger() -> str:
        request = ProvisionRequest(client_token="t", offer=offer(), site="", node_name="", user_data="")
        return account.rent("", request).id

    def refused(request: ProvisionRequest) -> ProvisionRequest:
        return replace(request, offer=replace(request.offer, instance_type="none"))

    bench = ProvisionerBench(
        make=lambda name: SimulatedCloud(account, installation=name),
        stranger=stranger,
        end=account.end,
        alive=lambda name: name in account.alive(),
        refused=refused,
    )
    assert callable(check)
    check(bench)
