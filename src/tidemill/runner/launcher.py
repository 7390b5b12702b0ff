"""The process that forks runners: it has everything imported, so that a runner is there in a few milliseconds.

The engine starts it and holds the other end of a socket; a request is a line with a launch's folder. Each
runner is forked twice and leads its own session, so it outlives the launcher and the engine, however they
end. When the engine lets go of the socket, or is gone, the launcher ends.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Final

from tidemill.runner import processes
from tidemill.runner.folders import LaunchFolder
from tidemill.runner.main import prepare_process, run_launch

_MAX_REQUEST: Final = 65_536


def serve(channel: socket.socket) -> None:
    """Fork a runner for each folder that comes through the channel, until its other end is closed."""
    channel.send(b"ready")
    while request := channel.recv(_MAX_REQUEST):
        channel.send(fork_runner(Path(os.fsdecode(request)), channel))


def fork_runner(folder: Path, channel: socket.socket) -> bytes:
    """``started`` once the runner has claimed the launch, ``known`` when it was another's, else why not."""
    ready, told = os.pipe()
    try:
        middle = os.fork()
    except OSError as error:
        os.close(ready)
        os.close(told)
        return f"failed {error.strerror}".encode()
    if not middle:
        try:
            os.setsid()
            if os.fork():
                os._exit(0)
            channel.close()
            os.close(ready)
            _become_runner(folder, told)
        finally:
            os._exit(70)
    os.close(told)
    os.waitpid(middle, 0)
    answer = os.read(ready, 64)
    os.close(ready)
    return answer or b"known"


def _become_runner(folder: Path, told: int) -> None:
    """Run the launch in this process and end it."""
    status = 70
    try:
        prepare_process(LaunchFolder(folder).diary)

        def claimed() -> None:
            with contextlib.suppress(OSError):  # the launcher may be gone, which is no reason not to run
                os.write(told, b"started")
            os.close(told)

        status = run_launch(folder, claimed)
    except Exception:
        logging.getLogger(__name__).exception("the runner failed")
    finally:
        os._exit(status)


def main() -> None:
    """Serve on the socket that the engine handed down as the given descriptor."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    processes.rename("tidemill-launch")
    gc.collect()
    gc.freeze()
    serve(socket.socket(fileno=int(sys.argv[-1])))


if __name__ == "__main__":
    main()
