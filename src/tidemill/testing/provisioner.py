"""The contract that every provisioner keeps, as checks that anybody can run against theirs: ``check_provisioner``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Final

from tidemill.errors import CloudRefused
from tidemill.model.cloud import Instance, InstanceState, Market, NoCapacity, Offer, ProvisionRequest
from tidemill.ports import Provisioner

_HERE: Final = (InstanceState.PENDING, InstanceState.RUNNING)
_OVER: Final = (InstanceState.ENDING, InstanceState.GONE)


@dataclass(slots=True)
class ProvisionerBench:
    """What the checks work with: an account of one's own, in which nothing else runs.

    ``make`` gives a new provisioner of an installation, as a restarted control plane would have. ``stranger`` rents an
    instance by the vendor's own means, without any of our tags, ``end`` ends one so, and ``alive`` says whether the
    vendor has it, pending or running. ``refused`` turns a request into one that is refused for good.
    """

    make: Callable[[str], Provisioner]
    stranger: Callable[[], str]
    end: Callable[[str], None]
    alive: Callable[[str], bool]
    refused: Callable[[ProvisionRequest], ProvisionRequest]
    patience_s: float = 30.0
    installation: str = "check"
    _numbers: Any = field(default_factory=lambda: count(time.time_ns()))

    def request(self, offer: Offer, **changes: Any) -> ProvisionRequest:
        """A request under a new client token."""
        number = next(self._numbers)
        base = ProvisionRequest(
            client_token=f"ren_{number}", offer=offer, site="check", node_name=f"check-{number}",
            user_data="#!/bin/sh\ntrue\n",
        )  # fmt: skip
        return replace(base, **changes)

    def rented(self, provisioner: Provisioner, **changes: Any) -> tuple[ProvisionRequest, Instance]:
        """A new instance of the first offer that has capacity, and what was asked for."""
        for offer in provisioner.offers():
            request = self.request(offer, **changes)
            found = provisioner.provision(request)
            if isinstance(found, Instance):
                return request, found
        raise AssertionError("no offer has capacity; the contract cannot be checked here")

    def eventually(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until it is true: a cloud's list may lag behind. Raises: AssertionError."""
        deadline_s = time.monotonic() + self.patience_s
        while not ready():
            _expect(time.monotonic() < deadline_s, f"not within {self.patience_s} s: {what}")
            time.sleep(0.05)


def check_offers_can_be_told_apart_and_have_prices(bench: ProvisionerBench) -> None:
    """Each offer has an id of its own, a size and a price; asked again they are the same offers."""
    provisioner = bench.make(bench.installation)
    offers = provisioner.offers()
    _expect(bool(offers), "there is something to rent")
    _expect(len({offer.id for offer in offers}) == len(offers), "two offers have the same id")
    for offer in offers:
        _expect(offer.price_micro_per_hour > 0, f"{offer.id} has no price")
        _expect(bool(offer.gpu_count) == bool(offer.gpu_model), f"{offer.id}: GPUs have a model, and only they")
        place = dict(offer.labels)
        _expect(place.get("region") == offer.region and place.get("zone") == offer.zone, f"{offer.id} is labelled")
    again = {offer.id for offer in bench.make(bench.installation).offers()}
    _expect(again == {offer.id for offer in offers}, "asked again, offers have other ids")


def check_an_instance_is_listed_with_what_it_is_for(bench: ProvisionerBench) -> None:
    """What was rented is in the list, with its token, site and name, of the type, zone and market that were asked."""
    provisioner = bench.make(bench.installation)
    request, made = bench.rented(provisioner)
    seen = _listed(bench, provisioner, made)
    told = (seen.client_token, seen.site, seen.node_name, seen.instance_type, seen.zone, seen.market)
    offer = request.offer
    wanted = (request.client_token, request.site, request.node_name, offer.instance_type, offer.zone, offer.market)
    _expect(told == wanted, f"{told} is listed, and {wanted} was asked for")
    _expect(seen.state in _HERE and bench.alive(made.id), "it is there")
    _expect(0 < seen.launched_ns < time.time_ns() + 3_600_000_000_000, "it says when it was launched")
    _end(bench, provisioner, made)


def check_a_client_token_rents_once(bench: ProvisionerBench) -> None:
    """The same request again, also from a control plane that was restarted, gives the same instance and no other."""
    provisioner = bench.make(bench.installation)
    request, made = bench.rented(provisioner)
    for again in (provisioner, bench.make(bench.installation)):
        found = again.provision(request)
        _expect(isinstance(found, Instance) and found.id == made.id, f"{found} is not {made.id}")
    bench.eventually(lambda: made.id in _ids(provisioner), "it is listed")
    same = [one.id for one in provisioner.instances() if one.client_token == request.client_token]
    _expect(same == [made.id], f"{same} were rented under one client token")
    _end(bench, provisioner, made)


def check_another_token_rents_another(bench: ProvisionerBench) -> None:
    """Requests that differ in nothing but the token rent two instances."""
    provisioner = bench.make(bench.installation)
    request, made = bench.rented(provisioner)
    other = provisioner.provision(bench.request(request.offer))
    if isinstance(other, NoCapacity):
        _end(bench, provisioner, made)
        return
    _expect(other.id != made.id, "two client tokens gave one instance")
    _end(bench, provisioner, made)
    _end(bench, provisioner, other)


def check_a_token_is_not_used_again_after_the_end(bench: ProvisionerBench) -> None:
    """A request repeated after its instance was ended gives that instance, and rents nothing."""
    provisioner = bench.make(bench.installation)
    request, made = bench.rented(provisioner)
    _end(bench, provisioner, made)
    found = bench.make(bench.installation).provision(request)
    _expect(isinstance(found, Instance) and found.id == made.id, f"{found} was rented after {made.id} ended")
    _expect(isinstance(found, Instance) and found.state in _OVER, "what ended is said to be there")


def check_release_ends_and_is_harmless_twice(bench: ProvisionerBench) -> None:
    """What is released ends; releasing it again, or what never was, raises nothing."""
    provisioner = bench.make(bench.installation)
    _, made = bench.rented(provisioner)
    bench.eventually(lambda: made.id in _ids(provisioner), "it is listed")
    provisioner.release(made.id)
    provisioner.release(made.id)
    bench.eventually(lambda: not bench.alive(made.id), "it ends")
    _wait_until_over(bench, provisioner, made)
    provisioner.release(made.id)
    for unknown in ("i-0123456789abcdef0", "never-was", ""):
        provisioner.release(unknown)


def check_what_is_not_ours_is_left_alone(bench: ProvisionerBench) -> None:
    """An instance without our tag, or with that of another installation, is neither listed nor ended."""
    provisioner, others = bench.make(bench.installation), bench.make(f"{bench.installation}-2")
    stranger = bench.stranger()
    _, theirs = bench.rented(others)
    _, made = bench.rented(provisioner)
    bench.eventually(lambda: made.id in _ids(provisioner) and theirs.id in _ids(others), "both are listed")
    _expect(not {stranger, theirs.id} & _ids(provisioner), "what is not ours is listed")
    for foreign in (stranger, theirs.id):
        provisioner.release(foreign)
        time.sleep(0.05)
        _expect(bench.alive(foreign), "an instance was ended that is not ours")
    _end(bench, provisioner, made)
    _end(bench, others, theirs)
    bench.end(stranger)


def check_the_list_is_the_clouds_own(bench: ProvisionerBench) -> None:
    """A control plane that was restarted lists what the one before rented, and sees what ended without it."""
    before = bench.make(bench.installation)
    _, made = bench.rented(before)
    after = bench.make(bench.installation)
    bench.eventually(lambda: made.id in _ids(after, *_HERE), "a new object lists what another rented")
    bench.end(made.id)
    for each in (before, after):
        _wait_until_over(bench, each, made)


def check_spot_is_rented_as_spot(bench: ProvisionerBench) -> None:
    """Where spot instances are to be had, one is rented as such, and for no more than its offer says."""
    provisioner = bench.make(bench.installation)
    capabilities = provisioner.capabilities
    spot = [offer for offer in provisioner.offers() if offer.market is Market.SPOT]
    _expect(capabilities.spot or not spot, "spot is offered, and the capabilities deny it")
    for offer in spot:
        found = provisioner.provision(bench.request(offer))
        if isinstance(found, Instance):
            seen = _listed(bench, provisioner, found)
            _expect(seen.market is Market.SPOT, "it was rented on demand")
            _end(bench, provisioner, found)
            return


def check_what_can_never_be_is_refused(bench: ProvisionerBench) -> None:
    """A request that would be refused again raises ``CloudRefused``, which says what is wrong and how to mend it."""
    provisioner = bench.make(bench.installation)
    request = bench.refused(bench.request(provisioner.offers()[0]))
    try:
        found = provisioner.provision(request)
    except CloudRefused as error:
        _expect(bool(error.field and error.mend), f"it does not say what is wrong, or how to mend it: {error}")
    else:
        raise AssertionError(f"it was not refused: {found}")
    _expect(request.client_token not in {one.client_token for one in provisioner.instances()}, "it was rented anyway")


def check_the_scope_stays(bench: ProvisionerBench) -> None:
    """The scope is one word, and the same after a restart and for another installation."""
    names = {bench.make(name).scope() for name in (bench.installation, bench.installation, f"{bench.installation}-2")}
    _expect(len(names) == 1 and all(name and " " not in name for name in names), str(names))


CHECKS: Final[tuple[Callable[[ProvisionerBench], None], ...]] = (
    check_offers_can_be_told_apart_and_have_prices,
    check_an_instance_is_listed_with_what_it_is_for,
    check_a_client_token_rents_once,
    check_another_token_rents_another,
    check_a_token_is_not_used_again_after_the_end,
    check_release_ends_and_is_harmless_twice,
    check_what_is_not_ours_is_left_alone,
    check_the_list_is_the_clouds_own,
    check_spot_is_rented_as_spot,
    check_what_can_never_be_is_refused,
    check_the_scope_stays,
)


def check_provisioner(bench: ProvisionerBench) -> None:
    """Run every check of the contract. It rents a dozen instances, and ends them.

    Raises: AssertionError that says what was not kept.
    """
    for check in CHECKS:
        check(bench)


def _ids(provisioner: Provisioner, *states: InstanceState) -> set[str]:
    return {one.id for one in provisioner.instances() if not states or one.state in states}


def _listed(bench: ProvisionerBench, provisioner: Provisioner, made: Instance) -> Instance:
    """The instance as the list has it, which may take a while."""
    bench.eventually(lambda: made.id in _ids(provisioner), "it is listed")
    return next(one for one in provisioner.instances() if one.id == made.id)


def _wait_until_over(bench: ProvisionerBench, provisioner: Provisioner, made: Instance) -> None:
    bench.eventually(lambda: made.id not in _ids(provisioner, *_HERE), "the list has it no more, or as over")


def _end(bench: ProvisionerBench, provisioner: Provisioner, made: Instance) -> None:
    bench.eventually(lambda: made.id in _ids(provisioner), "it is listed")
    provisioner.release(made.id)
    bench.eventually(lambda: not bench.alive(made.id), "what was released ends")


def _expect(kept: bool, what: str) -> None:
    """Raises: AssertionError when a promise was not kept; also where Python leaves out assert statements."""
    if not kept:
        raise AssertionError(what)
