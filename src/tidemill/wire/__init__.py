"""What crosses the edge: workload specs as people write them, checked all at once, and written back again.

``read_spec`` turns a mapping into a ``WorkloadSpec`` and reports every mistake in it, each with the field as it was
written, its value and the mend. ``spec_to_json`` is its inverse. Types are strict: text is not taken for a number.
"""

from tidemill.wire.checks import MAX_BYTES, MAX_DURATION_NS, Refusal
from tidemill.wire.parts import default_retry
from tidemill.wire.reading import read_request, read_spec
from tidemill.wire.scheduling import Moment, instant_text, length_of, moment_of
from tidemill.wire.schema import json_schema, spec_reference_markdown
from tidemill.wire.workload import WorkloadSpecIn
from tidemill.wire.writing import gpus_text, resources_json, spec_to_json

__all__ = [
    "MAX_BYTES",
    "MAX_DURATION_NS",
    "Moment",
    "Refusal",
    "WorkloadSpecIn",
    "default_retry",
    "gpus_text",
    "instant_text",
    "json_schema",
    "length_of",
    "moment_of",
    "read_request",
    "read_spec",
    "resources_json",
    "spec_reference_markdown",
    "spec_to_json",
]
