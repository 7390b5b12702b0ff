"""Counts of what passed, per model, as Prometheus text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from tidemill.core.buckets import bucket_of
from tidemill.units import SECOND_NS


@dataclass(slots=True)
class ModelCounts:
    """One model's figures since the process started; ``in_flight`` and ``waiting`` are the present."""

    requests: int = 0
    errors: int = 0
    streams: int = 0
    aborted: int = 0
    retries: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    ejections: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    waiting: int = 0


@dataclass(slots=True)
class VariantCounts:
    """One revision's figures, while a model is served by two; ``slow`` are times of answers, in buckets."""

    requests: int = 0
    errors: int = 0
    slow: dict[int, int] = field(default_factory=dict)

    def note(self, seconds: float | None) -> None:
        """A replica answered after so long; None: it failed."""
        self.requests += 1
        if seconds is None:
            self.errors += 1
        else:
            bucket = bucket_of(seconds * SECOND_NS)
            self.slow[bucket] = self.slow.get(bucket, 0) + 1


_HELP = {
    "requests": "Requests routed to the model.",
    "errors": "Requests that ended with a status of 500 or more, or broke off.",
    "streams": "Responses that were streams of events.",
    "aborted": "Requests whose client went away first.",
    "retries": "Second and later tries before the first byte.",
    "ejections": "Times that a replica was given up: it refused connections, or hung.",
    "prompt_tokens": "Tokens of requests, as metered.",
    "completion_tokens": "Tokens of responses, as metered.",
    "request_bytes": "Bytes of request bodies.",
    "response_bytes": "Bytes of response bodies passed on.",
}


@dataclass(slots=True)
class Metrics:
    """All figures of one gateway. A model enters when a request is first routed to it, so clients cannot add names."""

    models: dict[str, ModelCounts] = field(default_factory=dict)
    refused: dict[int, int] = field(default_factory=dict)
    """The gateway's own refusals, by status."""
    variants: dict[str, dict[str, VariantCounts]] = field(default_factory=dict)
    """By model, and by variant of it."""

    def of_variant(self, model: str, variant: str) -> VariantCounts:
        """The figures of one revision of a routed model."""
        variants = self.variants.setdefault(model, {})
        counts = variants.get(variant)
        if counts is None:
            counts = variants[variant] = VariantCounts()
        return counts

    def of(self, model: str) -> ModelCounts:
        """The figures of a routed model."""
        counts = self.models.get(model)
        if counts is None:
            counts = self.models[model] = ModelCounts()
        return counts

    def refuse(self, status: int) -> None:
        """Count one refusal."""
        self.refused[status] = self.refused.get(status, 0) + 1

    def text(
        self, *, connections: int, feed_version: int, feed_age_s: float, replicas: Mapping[tuple[str, str], int]
    ) -> bytes:
        """The Prometheus exposition of everything; ``replicas`` by model and state of their circuit."""
        lines: list[str] = []
        for name, text in _HELP.items():
            lines += [f"# HELP tidemill_gateway_{name}_total {text}", f"# TYPE tidemill_gateway_{name}_total counter"]
            lines += [
                f'tidemill_gateway_{name}_total{{model="{_escape(model)}"}} {getattr(counts, name)}'
                for model, counts in self.models.items()
            ]
        for name, text in (("in_flight", "Requests under way."), ("waiting", "Requests that wait for a replica.")):
            lines += [f"# HELP tidemill_gateway_{name} {text}", f"# TYPE tidemill_gateway_{name} gauge"]
            lines += [
                f'tidemill_gateway_{name}{{model="{_escape(model)}"}} {getattr(counts, name)}'
                for model, counts in self.models.items()
            ]
        for name, text in (
            ("requests", "Requests that a revision of the model got, while it is updated."),
            ("errors", "Those of them that it failed."),
        ):
            lines += [
                f"# HELP tidemill_gateway_variant_{name}_total {text}",
                f"# TYPE tidemill_gateway_variant_{name}_total counter",
            ]
            lines += [
                f'tidemill_gateway_variant_{name}_total{{model="{_escape(model)}",variant="{_escape(variant)}"}}'
                f" {getattr(counts, name)}"
                for model, variants in self.variants.items()
                for variant, counts in variants.items()
            ]
        lines += [
            "# HELP tidemill_gateway_replicas Replicas by circuit; those that are closed are sent requests.",
            "# TYPE tidemill_gateway_replicas gauge",
        ]
        lines += [
            f'tidemill_gateway_replicas{{model="{_escape(model)}",state="{state}"}} {n}'
            for (model, state), n in replicas.items()
        ]
        lines += [
            "# HELP tidemill_gateway_refused_total Requests that the gateway itself refused.",
            "# TYPE tidemill_gateway_refused_total counter",
        ]
        lines += [f'tidemill_gateway_refused_total{{status="{status}"}} {n}' for status, n in self.refused.items()]
        for name, text, value in (
            ("connections", "Open client connections.", connections),
            ("feed_version", "Version of the keys and routes in use.", feed_version),
            ("feed_age_seconds", "Seconds since the control plane last answered.", round(feed_age_s, 3)),
        ):
            lines += [
                f"# HELP tidemill_gateway_{name} {text}",
                f"# TYPE tidemill_gateway_{name} gauge",
                f"tidemill_gateway_{name} {value}",
            ]
        return ("\n".join(lines) + "\n").encode()


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
