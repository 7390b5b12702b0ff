"""What the API acknowledged, kept outside of it, and how each of it is found again.

Every answer to a request of a case is heard. A write that was answered with 2xx is expected to be there in the end as it
was answered: jobs by their names, stops, and whatever else by the page that lists it. A route that is not in the table is
an error of the suite: nobody would look.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

Call = Callable[[str, str], tuple[int, Any]]
"""Asks the API: method and path, for status and body."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A sort of thing: the page that lists them, the field that names one, and those that have to be as answered."""

    listed: str
    key: str
    fields: tuple[str, ...]


KINDS: Final = {
    "project": Kind("/v1/projects", "id", ("name", "limit_gpu_milli", "limit_cpu_milli", "limits", "countries")),
    "token": Kind(
        "/v1/tokens", "id",
        ("name", "scopes", "project", "expires_at_ns", "revoked_at_ns", "models", "limits", "priority", "label"),
    ),
    "secret": Kind("/v1/secrets", "name", ()),
    "queue": Kind("/v1/queues", "name", ("parent", "project", "weight", "guaranteed", "limit", "max_running", "max_queued")),
    "site": Kind("/v1/sites", "name", ("kind", "country", "pue", "lease_ns", "prices", "tariff_micro_per_kwh")),
    "node": Kind("/v1/nodes", "name", ("site",)),
}  # fmt: skip
_MADE: Final = (
    ("POST", r"/v1/projects", "project"),
    ("POST", r"/v1/tokens", "token"),
    ("PUT", r"/v1/tokens/[^/]+", "token"),
    ("DELETE", r"/v1/tokens/[^/]+", "token"),
    ("PUT", r"/v1/secrets/[^/]+", "secret"),
    ("PUT", r"/v1/queues/[^/]+", "queue"),
    ("PUT", r"/v1/sites/[^/]+", "site"),
)
_LEAVE_NOTHING: Final = (
    r"/v1/quotes",
    r"/v1/(chat/)?completions",
    r"/v1/sites/[^/]+/tokens",  # the machine that joined with it is what is left of it
    r"/v1/strangers/[^/]+/stop",
    r"/v1/workloads/[^/]+/(stop|rollback|promote|abort)",  # what became of the revisions, the case itself looks at
)


@dataclass(slots=True)
class Record:
    """What is to be there. ``acknowledged`` maps jobs to their names; ``stopped`` were told to stop; ``things`` are by
    kind and key; ``unknown`` are writes for which there is no way to look."""

    acknowledged: dict[str, str] = field(default_factory=dict)
    stopped: set[str] = field(default_factory=set)
    things: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)

    def heard(self, method: str, path: str, sent: Any, status: int, answer: Any) -> None:
        """A request was answered."""
        path = path.partition("?")[0]
        if method == "GET" or not 200 <= status < 300:
            return
        if stopped := re.fullmatch(r"/v1/jobs/([^/]+)/stop", path):
            self.stopped.add(stopped[1])
            return
        if re.fullmatch(r"/v1/workloads(/[^/]+/update)?", path):
            self.acknowledged |= {str(job["id"]): str(sent["spec"]["name"]) for job in answer["jobs"]}
            return
        for verb, pattern, kind in _MADE:
            if method == verb and re.fullmatch(pattern, path):
                self.add(kind, answer)
                return
        if not any(re.fullmatch(pattern, path) for pattern in _LEAVE_NOTHING):
            self.unknown.add(f"{method} {path}")

    def add(self, kind: str, answer: Mapping[str, Any]) -> None:
        """A thing of that kind is to be there as it was answered; what was said of it before is over."""
        known = KINDS[kind]
        self.things[kind, str(answer[known.key])] = {name: answer[name] for name in known.fields}

    def copy(self) -> Record:
        """What is to be there by now, which a backup that is made later has to hold."""
        return Record(dict(self.acknowledged), set(self.stopped), dict(self.things), set(self.unknown))

    def found(self, call: Call) -> dict[tuple[str, str], dict[str, Any]]:
        """What is there of the things, by the pages that list them. Raises: AssertionError when one is not answered."""
        there: dict[tuple[str, str], dict[str, Any]] = {}
        for kind in sorted({kind for kind, _ in self.things}):
            known, cursor = KINDS[kind], ""
            while True:
                status, page = call("GET", known.listed + (f"?cursor={cursor}" if cursor else ""))
                assert status == 200, (known.listed, page)
                for item in page["items"]:
                    there[kind, str(item[known.key])] = {name: item[name] for name in known.fields}
                cursor = page["next_cursor"]
                if not cursor:
                    break
        return there
