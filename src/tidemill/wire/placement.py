"""The section ``placement``: where a workload may go and where it would rather be."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Annotated, Any, Final

from pydantic import Field

from tidemill.model.fleet import Level, SiteKind
from tidemill.model.spec import Placement, Territory, Weight
from tidemill.wire.checks import LABEL, label_of, list_of, mapping_of
from tidemill.wire.scheduling import (
    MAX_WEIGHT,
    choice_of,
    countries_of,
    flag_of,
    kind_of_site,
    level_of,
    site_of,
    toleration_of,
    weights_of,
)
from tidemill.wire.section import TEXT, StrictSection, names_schema, one_or_more, problem, string_map, taking

_Labels = {"type": ["string", "number", "boolean"]}


def _level_schema(*levels: Level) -> dict[str, Any]:
    return {"type": "string", "enum": [level.value for level in levels]}


_ANY_LEVEL: Final = tuple(Level)
_SPREAD: Final = tuple(level for level in Level if level is not Level.NVLINK)


class PlacementIn(StrictSection):
    """Where workers may be put, and how they should lie to each other."""

    labels: Annotated[
        tuple[tuple[str, str], ...],
        *taking(
            mapping_of(LABEL, choice_of, "label: value", "Use letters, digits, - _ . or /."),
            string_map(_Labels, "^[A-Za-z0-9]"),
        ),
    ] = Field(
        default=(),
        description="Labels that the machines need to have; `a|b` accepts either.",
        json_schema_extra={"default": {}, "examples": [{"zone": "a|b"}]},
    )
    tolerations: Annotated[
        tuple[str, ...],
        *taking(
            list_of(toleration_of, "taints"),
            {"type": ["array", "null"], "items": TEXT, "examples": [["maintenance", "team=a"]]},
        ),
    ] = Field(default=(), description="Taints of machines that are put up with: `key`, or `key=value`.")
    within: Annotated[Level | None, *taking(level_of(*_ANY_LEVEL), _level_schema(*_ANY_LEVEL))] = Field(
        default=None,
        description="All workers of a job stay within one `site`, `block`, `rack`, `host` or `nvlink` island.",
    )
    prefer: Annotated[Level | None, *taking(level_of(*_ANY_LEVEL), _level_schema(*_ANY_LEVEL))] = Field(
        default=None, description="The same where it can be had, and as near to it as it goes where not."
    )
    spread: Annotated[Level | None, *taking(level_of(*_SPREAD), _level_schema(*_SPREAD))] = Field(
        default=None, description="No two workers of a job share a `host`, `rack`, `block` or `site`."
    )
    apart: Annotated[
        tuple[tuple[str, str], ...],
        *taking(
            mapping_of(LABEL, label_of, "label: value", "Use letters, digits, - _ . or /."),
            string_map(_Labels, "^[A-Za-z0-9]"),
        ),
    ] = Field(
        default=(),
        description="Not on machines where work of the project with one of these labels runs.",
        json_schema_extra={"default": {}, "examples": [{"app": "web"}]},
    )
    across_sites: Annotated[bool, *taking(flag_of, {"type": "boolean"})] = Field(
        default=False, description="Whether the workers of a job may lie at several sites; else it stays within one."
    )
    sites: Annotated[tuple[str, ...], *taking(one_or_more(site_of, "sites"), names_schema([["berlin", "paris"]]))] = (
        Field(default=(), description="At these sites only.")
    )
    countries: Annotated[tuple[str, ...], *taking(countries_of, names_schema([["DEU", "FRA"], ["EU"]]))] = Field(
        default=(),
        description="At sites in these countries only: ISO 3166 codes or English names; `EU` stands for its members."
        " A site whose country is not known is in none.",
    )
    kinds: Annotated[
        tuple[SiteKind, ...],
        *taking(
            one_or_more(kind_of_site, "kinds of site"),
            {
                "type": ["array", "string", "null"],
                "items": {"type": "string", "enum": [kind.value for kind in SiteKind]},
                "examples": [["edge"]],
            },
        ),
    ] = Field(default=(), description="At sites of these kinds only: `onprem`, `cloud`, `edge`.")
    weigh: Annotated[
        tuple[tuple[Weight, int], ...],
        *taking(
            weights_of,
            {
                "type": ["string", "object", "null"],
                "additionalProperties": {"type": "number", "exclusiveMinimum": 0, "maximum": MAX_WEIGHT},
                "propertyNames": {"enum": [what.value for what in Weight]},
                "examples": ["price", {"price": 2, "carbon": 1}],
            },
        ),
    ] = Field(
        default=(),
        description="What weighs when a site is chosen: `price`, `carbon`, `start` or `latency`, or several with their"
        " parts. Unless it is said: the soonest, then the cheapest, then the cleanest.",
        json_schema_extra={"default": ""},
    )
    near: Annotated[str, *taking(site_of, TEXT)] = Field(
        default="", description="The site that `latency` is measured from; said alone, latency weighs."
    )


def placement_of(given: PlacementIn) -> Placement:
    """The section checked; most workloads have none and share one."""
    if not given.model_fields_set:
        return _ANYWHERE
    where = Territory(given.sites, given.countries, given.kinds)
    return _placement(
        given.labels,
        given.tolerations,
        given.within,
        given.prefer,
        given.spread,
        given.apart,
        given.across_sites,
        where,
        given.weigh,
        given.near,
    )


_ANYWHERE: Final = Placement()
_placement = lru_cache(maxsize=1_024)(
    lambda labels, tolerations, within, prefer, spread, apart, across_sites, where, weigh, near: Placement(
        labels=labels,
        tolerations=tolerations,
        within=within,
        prefer=prefer,
        spread=spread,
        apart=apart,
        across_sites=across_sites,
        where=where,
        weigh=weigh,
        near=near,
    )
)


def impossible_sites(placement: PlacementIn) -> Iterator[dict[str, Any]]:
    """What its words about sites say against each other."""
    if placement.across_sites and placement.within:
        sentence = f"Workers cannot stay within one {placement.within} and lie across sites."
        yield problem("placement.across_sites", True, sentence, "Leave one of them out.")
    if Weight.LATENCY in dict(placement.weigh) and not placement.near:
        mend = "Write near: SITE; see tidemill site list."
        yield problem("placement.weigh", "latency", "It does not say from where latency is measured.", mend)
