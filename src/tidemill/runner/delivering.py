"""What a lost runner left undone: the output of its worker, and how that ended, brought to the control plane, once.

The runner was killed, or the machine lost its power, when the worker was over and not all of it was told. Its folder
has everything. The control plane skips what it has already, so nothing need be known of how far the runner came.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tidemill.runner.client import Channel, Refused, Unreachable
from tidemill.runner.folders import LaunchFolder, read_json
from tidemill.runner.logs import Shipper, Spool

LINGER_S: Final = 86_400.0
"""For how long after the worker's end a control plane that does not answer is asked, unless the settings say."""
QUIET_S: Final = 10.0
"""For how long it is when the launch was told to stop."""
_TOLD_ALONE: Final = ("prepared", "started")
"""Reports that matter still when the worker is over."""


def channel_of(spec: Mapping[str, Any]) -> Channel:
    """A connection to the control plane as the runner of that launch."""
    endpoint = str(spec["runner"]["endpoint_file"])
    return Channel(
        api_url=str(spec["api_url"]),
        endpoint_file=Path(endpoint) if endpoint else None,
        token=str(spec["runner_token"]),
        prefix=f"/v1/runners/{spec['launch_id']}",
        ca=str(dict(spec["environment_variables"]).get("TIDEMILL_API_CA", "")),
    )


def deliver(folder: LaunchFolder, spec: Mapping[str, Any]) -> None:
    """Nothing, when everything was told, or is not wanted any more; the launch's lock is held meanwhile."""
    try:
        _Delivery(folder, spec).run()
    except (OSError, ValueError, LookupError, TypeError):  # its files are not as they should be, and never will be
        traceback.print_exc()
    with contextlib.suppress(OSError):
        folder.reports.unlink(missing_ok=True)


class _Delivery:
    """One launch whose worker is over. It waits for the control plane as long as a runner would."""

    def __init__(self, folder: LaunchFolder, spec: Mapping[str, Any]) -> None:
        self._folder = folder
        self._channel = channel_of(spec)
        self._fence = int(spec["fence"])
        self._until_s = time.monotonic() + float(spec["runner"].get("linger_s") or LINGER_S)
        self._heard_s = time.monotonic()
        self._resting = threading.Event()
        self._spool = Spool(folder.output)
        self._spool.close()
        self._is_fenced = False

    def run(self) -> None:
        """All output, then the exit, if it is known."""
        shipper = Shipper(
            self._spool, self._channel, giving_up=self._resting, on_fenced=self._fence_off, on_delivered=lambda: None
        )
        while self._is_wanted():
            try:
                if shipper.send_next():
                    break
                self._heard_s = time.monotonic()
            except Unreachable:
                self._channel.rest(self._resting)
        ended = read_json(self._folder.exit)
        while ended is not None and self._is_wanted():
            try:
                self._report(ended)
                break
            except Unreachable:
                self._channel.rest(self._resting)

    def _fence_off(self) -> None:
        self._is_fenced = True

    def _is_wanted(self) -> bool:
        now_s = time.monotonic()
        if self._folder.stop.exists() and now_s - self._heard_s > QUIET_S:
            return False
        return not self._is_fenced and now_s < self._until_s

    def _report(self, ended: Mapping[str, Any]) -> None:
        said = {name: ended[name] for name in ("exit_code", "cause", "detail", "cpu_used_ns")}
        events = [*self._before(), {"type": "exited", "at_ns": ended["ended_ns"], **said}]
        try:
            self._channel.call("POST", "/report", json.dumps({"fence": self._fence, "events": events}).encode())
        except Refused as refusal:
            if refusal.fenced or refusal.status in (400, 413, 422):
                self._is_fenced = True
                return
            raise Unreachable(str(refusal)) from refusal

    def _before(self) -> list[dict[str, Any]]:
        """What the runner had to tell before the end; its last line may have been cut off."""
        found = []
        with contextlib.suppress(OSError):
            for line in self._folder.reports.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    event = json.loads(line)
                    if event.get("type") in _TOLD_ALONE:
                        found.append(event)
        return found
