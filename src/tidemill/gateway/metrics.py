"""Figures of what passed, per model, as Prometheus text.

What OpenTelemetry has a name for has that name, in Prometheus' spelling, with the buckets that it recommends: requests,
first tokens, further tokens, token counts. Source: OpenTelemetry, "Semantic conventions for generative AI metrics".
Everything is a sum or a count, so that what several processes tell can be added up.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tidemill.core.buckets import bucket_of
from tidemill.units import SECOND_NS

OPERATIONS: Final = {
    b"/v1/chat/completions": "chat",
    b"/v1/responses": "chat",
    b"/v1/completions": "text_completion",
    b"/v1/embeddings": "embeddings",
    b"/v1/rerank": "rerank",
}
"""``gen_ai.operation.name`` by path."""
ABORTED: Final = "client_closed"
"""The type of error of a request whose client went away."""

_DURATIONS: Final = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRSTS: Final = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_GAPS: Final = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS: Final = tuple(float(4**power) for power in range(14))


class Histogram:
    """How many values there were up to each bound, and their sum."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def note(self, value: float) -> None:
        """Count one."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str, labels: str) -> Iterator[str]:
        """Its series; ``labels`` without braces."""
        seen = 0
        for bound, count in zip((*self.bounds, None), self.counts, strict=True):
            seen += count
            yield f'{name}_bucket{{{labels},le="{"+Inf" if bound is None else f"{bound:g}"}"}} {seen}'
        yield f"{name}_sum{{{labels}}} {round(self.total, 6):.15g}"
        yield f"{name}_count{{{labels}}} {seen}"


class OperationCounts:
    """How long one kind of request to one model takes, in seconds, and how many tokens."""

    __slots__ = ("durations", "first", "gap", "input_tokens", "output_tokens", "queue")

    def __init__(self) -> None:
        self.durations: dict[str, Histogram] = {"": Histogram(_DURATIONS)}
        """By type of error, which is empty for what went well."""
        self.first = Histogram(_FIRSTS)
        self.gap = Histogram(_GAPS)
        self.queue = Histogram(_FIRSTS)
        self.input_tokens = Histogram(_TOKENS)
        self.output_tokens = Histogram(_TOKENS)

    def over(self, error: str, seconds: float) -> None:
        """One is over."""
        durations = self.durations.get(error)
        if durations is None:
            durations = self.durations[error] = Histogram(_DURATIONS)
        durations.note(seconds)


@dataclass(slots=True)
class ModelCounts:
    """One model's figures since the process started; ``in_flight`` and ``waiting`` are the present."""

    requests: int = 0
    errors: int = 0
    streams: int = 0
    aborted: int = 0
    retries: int = 0
    hedges: int = 0
    request_bytes: int = 0
    response_bytes: int = 0
    ejections: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    in_flight: int = 0
    waiting: int = 0
    operations: dict[str, OperationCounts] = field(default_factory=dict)

    def of(self, operation: str) -> OperationCounts:
        """The figures of one kind of request."""
        counts = self.operations.get(operation)
        if counts is None:
            counts = self.operations[operation] = OperationCounts()
        return counts


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
    "hedges": "Requests that were sent to a second replica because the first took long.",
    "ejections": "Times that a replica was given up: it refused connections, hung, or was far off its peers.",
    "prompt_tokens": "Tokens of requests, as metered.",
    "cached_tokens": "Tokens of requests that replicas had in their prefix cache, as they told.",
    "completion_tokens": "Tokens of responses, as metered.",
    "request_bytes": "Bytes of request bodies.",
    "response_bytes": "Bytes of response bodies passed on.",
}
_HISTOGRAMS: Final = {
    "gen_ai_server_time_to_first_token_seconds": "From a whole request to the first byte of its stream.",
    "gen_ai_server_time_per_output_token_seconds": "Between the tokens of a stream, after the first, on average.",
    "gen_ai_server_request_duration_seconds": "From a whole request to the end of its answer.",
    "gen_ai_client_token_usage": "Tokens of a request and of its response, as metered.",
    "tidemill_gateway_queue_seconds": "How long requests waited for a replica's turn.",
}
_PLAIN: Final = {
    "spans": "Spans that the collector took.",
    "spans_dropped": "Spans that were dropped: the collector was away for too long.",
}


@dataclass(slots=True)
class Metrics:
    """All figures of one gateway. A model enters when a request is first routed to it, so clients cannot add names."""

    models: dict[str, ModelCounts] = field(default_factory=dict)
    refused: dict[tuple[int, str], int] = field(default_factory=dict)
    """The gateway's own refusals, by status and code."""
    decisions: dict[tuple[str, str, str], int] = field(default_factory=dict)
    """What guardrails decided, by model, rule and action."""
    spans: int = 0
    spans_dropped: int = 0
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

    def refuse(self, status: int, code: str = "") -> None:
        """Count one refusal."""
        self.refused[status, code] = self.refused.get((status, code), 0) + 1

    def text(
        self, *, connections: int, feed_version: int, feed_age_s: float, replicas: Mapping[tuple[str, str], int]
    ) -> bytes:
        """The Prometheus exposition of everything; ``replicas`` by model and state of their circuit."""
        lines: list[str] = []
        for name, text in _HELP.items():
            lines += _heading(f"tidemill_gateway_{name}_total", "counter", text)
            lines += [
                f'tidemill_gateway_{name}_total{{model="{_escape(model)}"}} {getattr(counts, name)}'
                for model, counts in self.models.items()
            ]
        for name, text in (("in_flight", "Requests under way."), ("waiting", "Requests that wait for a replica.")):
            lines += _heading(f"tidemill_gateway_{name}", "gauge", text)
            lines += [
                f'tidemill_gateway_{name}{{model="{_escape(model)}"}} {getattr(counts, name)}'
                for model, counts in self.models.items()
            ]
        for name, text in _HISTOGRAMS.items():
            lines += _heading(name, "histogram", text)
            for model, counts in self.models.items():
                for operation, one in counts.operations.items():
                    if not operation:  # it is no inference
                        continue
                    lines += _operation_lines(name, _escape(model), operation, one)
        for name, text in (
            ("requests", "Requests that a revision of the model got, while it is updated."),
            ("errors", "Those of them that it failed."),
        ):
            lines += _heading(f"tidemill_gateway_variant_{name}_total", "counter", text)
            lines += [
                f'tidemill_gateway_variant_{name}_total{{model="{_escape(model)}",variant="{_escape(variant)}"}}'
                f" {getattr(counts, name)}"
                for model, variants in self.variants.items()
                for variant, counts in variants.items()
            ]
        lines += _heading(
            "tidemill_gateway_replicas", "gauge", "Replicas by circuit; those that are closed are sent requests."
        )
        lines += [
            f'tidemill_gateway_replicas{{model="{_escape(model)}",state="{state}"}} {n}'
            for (model, state), n in replicas.items()
        ]
        lines += _heading("tidemill_gateway_refused_total", "counter", "Requests that the gateway itself refused.")
        lines += [
            f'tidemill_gateway_refused_total{{status="{status}",code="{code}"}} {n}'
            for (status, code), n in self.refused.items()
        ]
        lines += _heading("tidemill_gateway_guard_decisions_total", "counter", "What guardrails decided.")
        lines += [
            f'tidemill_gateway_guard_decisions_total{{model="{_escape(model)}",rule="{rule}",action="{action}"}} {n}'
            for (model, rule, action), n in self.decisions.items()
        ]
        for name, text in _PLAIN.items():
            lines += _heading(f"tidemill_gateway_{name}_total", "counter", text)
            lines.append(f"tidemill_gateway_{name}_total {getattr(self, name)}")
        for name, text, value in (
            ("connections", "Open client connections.", connections),
            ("feed_version", "Version of the keys and routes in use.", feed_version),
            ("feed_age_seconds", "Seconds since the control plane last answered.", round(feed_age_s, 3)),
        ):
            lines += _heading(f"tidemill_gateway_{name}", "gauge", text)
            lines.append(f"tidemill_gateway_{name} {value}")
        return ("\n".join(lines) + "\n").encode()


def _operation_lines(name: str, model: str, operation: str, counts: OperationCounts) -> Iterator[str]:
    labels = f'gen_ai_operation_name="{operation}",gen_ai_provider_name="tidemill",gen_ai_request_model="{model}"'
    match name:
        case "gen_ai_server_time_to_first_token_seconds":
            yield from counts.first.lines(name, labels)
        case "gen_ai_server_time_per_output_token_seconds":
            yield from counts.gap.lines(name, labels)
        case "gen_ai_server_request_duration_seconds":
            for error, durations in counts.durations.items():
                yield from durations.lines(name, labels + f',error_type="{error}"')
        case "gen_ai_client_token_usage":
            yield from counts.input_tokens.lines(name, labels + ',gen_ai_token_type="input"')
            yield from counts.output_tokens.lines(name, labels + ',gen_ai_token_type="output"')
        case _:
            yield from counts.queue.lines(name, f'model="{model}",operation="{operation}"')


def _heading(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _escape(label: str) -> str:
    return label.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')
