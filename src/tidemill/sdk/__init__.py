"""The Python client of a Tidemill control plane; ``Client`` has the same verbs as the command line.

>>> from tidemill.sdk import Client  # doctest: +SKIP
>>> Client().run({"run": "echo hello"}).state  # doctest: +SKIP
'succeeded'

The transport is the standard library's ``http.client``, not httpx: importing httpx costs as much as a
whole ``tidemill run -- echo hi`` may take, and a client that speaks JSON to one address needs little of it.
"""

from tidemill.sdk.client import Client
from tidemill.sdk.inside import checkpointed
from tidemill.sdk.results import (
    ArtifactInfo,
    DataSetInfo,
    ExecResult,
    Forecast,
    Holding,
    Job,
    JobUpdate,
    LogChunk,
    ModelInfo,
    ModelVersionInfo,
    NodeInfo,
    Option,
    QueuedJob,
    QueueInfo,
    Quote,
    Reason,
    Receipt,
    ReservationInfo,
    Share,
    Status,
    Stranger,
    VolumeInfo,
    Why,
    Worker,
    Workload,
)

__all__ = [
    "ArtifactInfo",
    "Client",
    "DataSetInfo",
    "ExecResult",
    "Forecast",
    "Holding",
    "Job",
    "JobUpdate",
    "LogChunk",
    "ModelInfo",
    "ModelVersionInfo",
    "NodeInfo",
    "Option",
    "QueueInfo",
    "QueuedJob",
    "Quote",
    "Reason",
    "Receipt",
    "ReservationInfo",
    "Share",
    "Status",
    "Stranger",
    "VolumeInfo",
    "Why",
    "Worker",
    "Workload",
    "checkpointed",
]
