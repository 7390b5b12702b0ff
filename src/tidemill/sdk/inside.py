"""What a program calls that runs in a job itself."""

from __future__ import annotations

import os

from tidemill.errors import InvalidRequest
from tidemill.sdk.client import Client

JOB_VARIABLE = "TIDEMILL_JOB_ID"


def checkpointed(detail: str = "") -> None:
    """Tell the scheduler that the work up to now is safe, so that it loses little if it has to give way.

    Call it after a checkpoint is complete in ``$TIDEMILL_CHECKPOINT_DIR``, from one worker; ``detail`` may say which
    step it was. Raises: InvalidRequest outside of a job, Fenced when a newer attempt runs.
    """
    job = os.environ.get(JOB_VARIABLE, "")
    if not job:
        raise InvalidRequest(
            "this program does not run in a job",
            field=JOB_VARIABLE,
            mend="Run it with tidemill run, or skip this call.",
        )
    with Client() as client:
        client.checkpointed(job, detail)
