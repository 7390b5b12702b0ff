"""③ What it takes to bring a job's data to a site: time, and money for what leaves its home.

Sizes and links are estimates, so the answer is one: all files over one way, its bandwidth shared by all machines that
copy, and for each file one round trip, ``STREAMS`` of them at a time. What a machine of the site has already is not
copied again, because placement prefers such machines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tidemill.model.fleet import Link, Node, Site, link_between
from tidemill.model.ids import NodeId, ProjectId, SiteId
from tidemill.model.spec import WorkloadSpec
from tidemill.model.storage import DataMode, DataMount
from tidemill.units import SECOND_NS

OBJECT_STORE: Final = SiteId("s3")
"""What a site's link to S3 names."""
EGRESS: Final = "egress"
"""What a price for data that leaves a site is listed as: micro-USD for a GB."""
USUAL_BITS_PER_S: Final = 1_000_000_000
USUAL_LATENCY_NS: Final = 50_000_000
"""What is assumed of a way that nothing is known of."""
STREAMS: Final = 8
GB: Final = 1_000_000_000
_SEPARATOR: Final = "\t"


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """One data set that a job needs: ``digest`` of its manifest, ``size`` in bytes, number of ``files``.

    ``home`` is the site of its folder, ``OBJECT_STORE`` for S3; ``node`` the one machine there that has it; empty: all.
    """

    digest: str
    size: int
    files: int
    home: SiteId
    mode: DataMode = DataMode.AUTO
    node: str = ""

    def is_at(self, site: SiteId) -> bool:
        """Whether every machine of a site has its home, and it may be used as it is."""
        return self.mode is not DataMode.COPY and site == self.home and not self.node

    def written(self) -> str:
        """The need as one text, which ``need_of`` reads."""
        values = (self.digest, str(self.size), str(self.files), self.home, self.mode.value, self.node)
        return _SEPARATOR.join(values)


@lru_cache(maxsize=4_096)
def need_of(written: str) -> Need:
    """The need behind its text.

    >>> one = Need(digest="ab", size=1, files=1, home=SiteId("north"))
    >>> need_of(one.written()) == one
    True
    """
    digest, size, files, home, mode, node = written.split(_SEPARATOR)
    return Need(digest=digest, size=int(size), files=int(files), home=SiteId(home), mode=DataMode(mode), node=node)


def needs_of(spec: WorkloadSpec) -> tuple[Need, ...]:
    """The data sets that a job of the workload needs copied or mounted, in the order of their digests."""
    return tuple(sorted((_need(one) for one in spec.data if one.digest), key=Need.written))


def _need(mount: DataMount) -> Need:
    home = OBJECT_STORE if mount.home.startswith("s3://") else mount.site_id
    return Need(digest=mount.digest, size=mount.size, files=mount.files, home=home, mode=mount.mode, node=mount.node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """What is copied to a site, how long that takes, and what is paid for it."""

    size: int = 0
    time_ns: int = 0
    cost_micro: int = 0


def transfer(
    needs: Iterable[Need],
    site: SiteId,
    *,
    machines: int,
    is_cached: Callable[[Need], bool],
    link: Callable[[SiteId], Link | None],
    egress_micro: Callable[[SiteId], int],
) -> Transfer:
    """What it takes to have these on ``machines`` machines of a site.

    ``is_cached`` says whether machines there have it; ``link`` gives the way from a home to the site, None when it is
    not known; ``egress_micro`` the price in micro-USD for a GB that leaves a home.
    """
    size = time_ns = cost = 0
    for need in needs:
        if need.is_at(site) or is_cached(need):
            continue
        octets = need.size * machines
        size += octets
        time_ns += copy_ns(octets, need.files * machines, link(need.home) if need.home != site else LOCAL)
        if need.home != site:
            cost += octets * egress_micro(need.home) // GB
    return Transfer(size=size, time_ns=time_ns, cost_micro=cost)


LOCAL: Final = Link(to=SiteId(""), latency_ns=200_000, bits_per_s=10_000_000_000)
"""What is assumed of the way between machines of one site."""


def copy_ns(size: int, files: int, link: Link | None) -> int:
    """How long so many bytes in so many files take over a link; nothing takes no time.

    >>> copy_ns(125_000_000, 1, Link(to=SiteId("x"), latency_ns=0, bits_per_s=1_000_000_000))
    1000000000
    """
    if not files:
        return 0
    bits_per_s = (link.bits_per_s if link is not None else 0) or USUAL_BITS_PER_S
    latency_ns = link.latency_ns if link is not None else USUAL_LATENCY_NS
    return -(-size * 8 * SECOND_NS // bits_per_s) + -(-files // STREAMS) * latency_ns


def way(sites: Mapping[SiteId, Site], home: SiteId, site: SiteId) -> Link | None:
    """The link between a data set's home and a site; None when none is known."""
    return link_between(sites, site, home)


def have_all(
    needs: Sequence[Need], nodes: Sequence[Node], cached: Mapping[NodeId, frozenset[str]], project: ProjectId
) -> NDArray[np.bool_]:
    """Which nodes would copy nothing: they have a copy, or the home itself. Shape (N,)."""
    return np.array([all(_has(node, need, cached, project) for need in needs) for node in nodes], np.bool_)


def _has(node: Node, need: Need, cached: Mapping[NodeId, frozenset[str]], project: ProjectId) -> bool:
    if f"{project}/{need.digest}" in cached.get(node.id, frozenset()):
        return True
    return need.mode is not DataMode.COPY and node.site_id == need.home and need.node in ("", node.name)
