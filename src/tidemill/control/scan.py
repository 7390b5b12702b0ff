"""The process that reads a data set in S3 once, to know its content: so much work is not for the control plane's own.

It is told on its standard input where to look, with the credentials, which are so on no command line, and writes a line
of JSON for each file: path, size, SHA-256. The last line says how it ended.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Final

from tidemill.control.homes import Bucket, S3Place, read_all
from tidemill.errors import InvalidRequest, NotFound, TidemillError, Unavailable
from tidemill.model.storage import DataFile

_NO_CREDENTIALS: Final = {
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}
_ERRORS: Final[dict[str, type[TidemillError]]] = {one.code: one for one in (InvalidRequest, NotFound, Unavailable)}


def scan(place: S3Place, *, told: Callable[[int, int], object], stopped: Callable[[], bool]) -> Iterator[DataFile]:
    """The files there, read by a process of its own. ``told`` gets how many were read of how many, now and then.

    Raises: NotFound, InvalidRequest, Unavailable as that process says, also when ``stopped``.
    """
    variables = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | _NO_CREDENTIALS
    process = subprocess.Popen(
        [sys.executable, "-m", "tidemill.control.scan"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, env=variables, text=True, start_new_session=True,
    )  # fmt: skip
    ended: dict[str, Any] = {}
    try:
        if process.stdin is None or process.stdout is None:
            raise Unavailable("The process that reads data sets has no pipes.")
        process.stdin.write(json.dumps(asdict(place)))
        process.stdin.close()
        seen = total = 0
        for line in process.stdout:
            if stopped():
                raise Unavailable("The control plane is closing.")
            said = json.loads(line)
            if isinstance(said, dict):
                ended = said
                total = int(said.get("total", total))
                continue
            seen += 1
            if not seen % 256:
                told(seen, total)
            yield DataFile(*said)
    except OSError as error:
        raise Unavailable(f"The process that reads data sets broke: {error}.") from error
    finally:
        process.kill()
        process.wait()
    if not ended.get("done"):
        kind = _ERRORS.get(str(ended.get("code")), Unavailable)
        raise kind(str(ended.get("detail") or "The process that reads data sets ended early."))


def main() -> int:
    """The exit status, when all was told."""
    os.nice(5)
    place = S3Place(**json.loads(sys.stdin.read()))
    try:
        home = Bucket(place)
        sizes = home.sizes()
        _say({"total": len(sizes)})
        for file in read_all(home, sizes):
            _say([file.path, file.size, file.digest])
    except TidemillError as error:
        _say({"code": error.code, "detail": error.detail})
        return 1
    _say({"done": True})
    return 0


def _say(what: object) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
