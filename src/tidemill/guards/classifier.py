"""A classifier service that is asked over HTTP what it thinks of a text."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from typing import Any, Final

from tidemill.guards.looking import Found

_MOST_ANSWER: Final = 64 * 1024


class Classifier:
    """Finds a text as a whole when a service says so.

    ``url`` is sent ``{"text": …}`` and answers with ``{"score": 0.97}`` or ``{"flagged": true}``; a list of
    ``{"label": …, "score": …}`` is understood too, of which the best among ``labels`` counts, or the best of all.
    """

    reach: int = 0
    is_slow: bool = True

    def __init__(
        self, *, url: str, threshold: float = 0.5, timeout_s: float = 5.0, label: str = "INJECTION",
        labels: tuple[str, ...] | list[str] = (),
    ) -> None:  # fmt: skip
        if not isinstance(url, str) or not re.fullmatch(r"https?://[^/\s?#]+(/\S*)?", url):
            raise ValueError(f"url: {url!r} is no address, such as http://127.0.0.1:8080/classify")
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
            raise ValueError(f"threshold: {threshold!r} is no share, more than 0, up to 1")
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= 60:
            raise ValueError(f"timeout_s: {timeout_s!r} is no number of seconds up to 60")
        if not re.fullmatch(r"[A-Z][A-Z0-9_]{0,30}", str(label)):
            raise ValueError(f"label: {label!r} is no word in capitals, such as INJECTION")
        if isinstance(labels, str):
            raise ValueError(f"labels: {labels!r} is no list")
        self._url, self._threshold, self._timeout_s, self._label = url, threshold, timeout_s, label
        self._labels = frozenset(labels)

    def find(self, text: str, start: int = 0) -> list[Found]:
        """All of the text, or nothing. Raises: OSError or ValueError when the service does not say."""
        if not text.strip():
            return []
        body = json.dumps({"text": text[start:]}).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        request = urllib.request.Request(self._url, body, headers, method="POST")  # noqa: S310 - checked: http(s)
        with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:  # noqa: S310
            said = json.loads(answer.read(_MOST_ANSWER))
        return [Found(start, len(text), self._label)] if self._score(said) >= self._threshold else []

    def open_from(self, text: str) -> int:  # noqa: ARG002 - it sees texts whole
        """All is open until the text is whole."""
        return 0

    def _score(self, said: Any) -> float:
        if isinstance(said, list):
            flat = [one for part in said for one in (part if isinstance(part, list) else [part])]
            scores = [
                float(one["score"]) for one in flat
                if isinstance(one, dict) and (not self._labels or one.get("label") in self._labels)
            ]  # fmt: skip
            return max(scores, default=0.0)
        if isinstance(said, dict) and isinstance(said.get("score"), int | float):
            return float(said["score"])
        if isinstance(said, dict) and isinstance(said.get("flagged"), bool):
            return float(said["flagged"])
        raise ValueError("the classifier's answer has neither score nor flagged")
