"""One line on standard error that says what is being waited for, with the seconds; gone when the wait is over.

Where no person looks, each new text is written once, as a plain line.
"""

from __future__ import annotations

import sys
import threading
import time

from tidemill.cli.output import clip, is_terminal, note, paint, width

_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_QUIET_S = 0.15


class Ticker:
    """A waiting line; use as a context manager. ``say`` changes its text, ``hide`` takes it off the screen."""

    def __init__(self, text: str = "", *, is_silent: bool = False) -> None:
        self._text = ""
        self._is_silent = is_silent
        self._is_live = is_terminal(sys.stderr) and not is_silent
        self._since = time.monotonic()
        self._shown = False
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        if text:
            self.say(text)

    def __enter__(self) -> Ticker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Wait for something else; the seconds begin anew."""
        if text == self._text or self._is_silent:
            return
        if not self._is_live:
            self._text = text
            if text:
                note(text)
            return
        with self._lock:
            self._text, self._since = text, time.monotonic()
        if text and self._thread is None:
            self._thread = threading.Thread(target=self._turn, name="ticker", daemon=True)
            self._thread.start()
        elif not text:
            self.hide()

    def amend(self, text: str) -> None:
        """Change the text while the seconds go on; where no person looks, say nothing."""
        if self._is_live:
            with self._lock:
                self._text = text

    def hide(self) -> None:
        """Take the line off the screen until it is next due; before other output."""
        with self._lock:
            if self._shown:
                sys.stderr.write("\r\x1b[2K")
                sys.stderr.flush()
                self._shown = False

    def close(self) -> None:
        """Stop; harmless twice."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.hide()

    def _turn(self) -> None:
        turn = 0
        while not self._over.wait(0.1):
            with self._lock:
                seconds = time.monotonic() - self._since
                if not self._text or seconds < _QUIET_S:
                    continue
                passed = f"  {seconds:.0f} s" if seconds >= 2 else ""
                text = clip(self._text, width() - 4 - len(passed))
                mark = paint(_FRAMES[turn % len(_FRAMES)], "cyan", sys.stderr)
                sys.stderr.write(f"\r\x1b[2K{mark} {text}{paint(passed, 'muted', sys.stderr)}")
                sys.stderr.flush()
                self._shown = True
                turn += 1
