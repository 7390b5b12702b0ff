"""Whether the cloud is about to take this machine back, as the metadata service on it tells.

EC2 announces the end of a spot instance two minutes ahead. It becomes a drain of the node with an end: what runs is
stopped with its checkpoint grace, or with what is left of it, and queues again. Source: EC2 user guide, "Spot Instance
interruption notices" and "Use the Instance Metadata Service" (version 2: a token is asked for first).
"""

from __future__ import annotations

import json
import logging
import urllib.request
from datetime import datetime
from typing import Any, Final
from urllib.error import HTTPError

from tidemill.model.events import Marking, NodeMarked
from tidemill.model.ids import NodeId
from tidemill.telemetry.node import node_id
from tidemill.units import SECOND_NS

log = logging.getLogger(__name__)
METADATA_URL: Final = "http://169.254.169.254"
_TOKEN: Final = "/latest/api/token"  # noqa: S105 - a path
_NOTICE: Final = "/latest/meta-data/spot/instance-action"
_TOKEN_LASTS_S: Final = 21_600
_LONGEST: Final = 65_536


class InterruptionWatcher:
    """Asks the metadata service of one machine. Every 5 seconds is how often EC2 recommends to ask.

    ``timeout_s`` is for one question; a service that does not answer, as on a machine that is not rented, is no notice.
    """

    def __init__(self, node: NodeId | None = None, *, base_url: str = METADATA_URL, timeout_s: float = 2.0) -> None:
        self._node_id = node or node_id()
        self._base_url = base_url.rstrip("/")
        self._timeout_s = timeout_s
        self._token = ""
        self._told = ""
        # A proxy of the environment must not be asked about this machine.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def interruption_facts(self, now: int) -> list[NodeMarked]:
        """That this machine is to be emptied until it is taken back: each notice once, none while there is none."""
        notice = self._notice()
        action, at = (str(notice.get(name, "")) for name in ("action", "time")) if notice else ("", "")
        if not action or f"{action} {at}" == self._told:
            return []
        try:
            until_ns = int(datetime.fromisoformat(at).timestamp() * 1_000) * (SECOND_NS // 1_000)
        except ValueError:
            log.warning("the metadata service says %s at %r, which is no instant; it is taken to be now", action, at)
            until_ns = now
        self._told = f"{action} {at}"
        return [
            NodeMarked(
                at_ns=now,
                node_id=self._node_id,
                marking=Marking.DRAIN,
                by="the cloud",
                detail=f"it takes the machine back ({action})",
                until_ns=max(until_ns, 1),
            )
        ]

    def _notice(self) -> dict[str, Any] | None:
        """What is announced; None: nothing, or nobody answers."""
        for _ in range(2):
            try:
                if not self._token:
                    wanted = {"X-aws-ec2-metadata-token-ttl-seconds": str(_TOKEN_LASTS_S)}
                    self._token = self._ask("PUT", _TOKEN, wanted).decode("ascii").strip()
                said = json.loads(self._ask("GET", _NOTICE, {"X-aws-ec2-metadata-token": self._token}))
            except HTTPError as error:
                error.close()
                if error.code != 401:
                    return None
                self._token = ""  # it ran out: ask for another, once
            except (OSError, ValueError):
                return None
            else:
                return said if isinstance(said, dict) else None
        return None

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> bytes:
        request = urllib.request.Request(self._base_url + path, headers=headers, method=method)  # noqa: S310 - http only
        with self._opener.open(request, timeout=self._timeout_s) as answer:
            content: bytes = answer.read(_LONGEST)
            return content
