"""The gateway's process: ``python -m tidemill.gateway --listen 127.0.0.1:7071 --control http://127.0.0.1:7070 …``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import uvloop

from tidemill.gateway.books import Books
from tidemill.gateway.feed import Feed
from tidemill.gateway.server import Gateway, Limits
from tidemill.gateway.siblings import Siblings
from tidemill.gateway.tracing import Tracer, headers_of

_SHARES_LIMIT = 16 * 1024 * 1024
_COLLECTED = (10_000, 50, 100)
"""How seldom cyclic garbage is looked for: a request leaves none, and what is there lives long."""
ADDRESS_IN_USE = 98
"""The exit status when another process listens there."""


def main(argv: Sequence[str] | None = None) -> int:
    """The process's exit status."""
    options = _options(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        pepper = _pepper(options.pepper_file)
        host, port = _address(options.listen)
    except (OSError, ValueError) as error:
        logging.getLogger("tidemill.gateway").error("%s", error)
        return 2
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(options, host, port, pepper))


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tidemill.gateway", description="Serve the OpenAI API.")
    parser.add_argument("--listen", default="127.0.0.1:7071", metavar="HOST:PORT")
    parser.add_argument("--control", default="http://127.0.0.1:7070", metavar="URL")
    parser.add_argument("--token-file", required=True, type=Path, help="the gateway's own token")
    parser.add_argument("--pepper-file", required=True, type=Path, help="the key that tokens are hashed with")
    parser.add_argument("--home", required=True, type=Path, help="where the last good feed is kept")
    parser.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="a further Host to answer to; may be repeated"
    )
    parser.add_argument("--drain", type=float, default=30.0, metavar="SECONDS", help="time to finish after SIGTERM")
    parser.add_argument("--traces", default="", metavar="URL", help="an OTLP/HTTP collector for traces")
    parser.add_argument("--trace-ratio", type=float, default=1.0, metavar="N", help="the share that is traced, 0 to 1")
    parser.add_argument("--worker", type=int, default=0, metavar="N", help="which of the processes that listen there")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="how many processes listen there")
    return parser.parse_args(argv)


async def _serve(options: argparse.Namespace, host: str, port: int, pepper: bytes) -> int:
    log = logging.getLogger("tidemill.gateway")
    loop = asyncio.get_running_loop()
    several = options.workers > 1
    books = Books(options.home / "usage")
    rulings = Books(options.home / "rulings", what="rulings")
    gateway = Gateway(
        pepper=pepper,
        own_token=lambda: feed.token,
        hosts=frozenset(name.lower().encode() for name in _hosts(host, options.allow_host)),
        limits=Limits(connections=_raise_file_limit()),
        feed_age_s=lambda: loop.time() - feed.heard_at,
        books=books,
        rulings=rulings,
        place=f"{socket.gethostname()}:{port}" + (f".{options.worker}" if several else ""),
        workers=options.workers,
        limits_copy=options.home / "gateway-limits.json",
    )
    if several:
        gateway.siblings = Siblings(options.home / "gateway-metrics", options.worker, gateway.metrics_text)
    feed = Feed(
        control=options.control,
        token_file=options.token_file,
        copy=options.home / "gateway-feed.json",
        adopt=gateway.adopt,
    )
    if options.traces:
        gateway.tracer = Tracer(
            options.traces,
            metrics=gateway.metrics,
            ratio=options.trace_ratio,
            headers=headers_of(os.environ.get("OTEL_EXPORTER_OTLP_HEADERS", "")),
            instance=f"{socket.gethostname()}:{os.getpid()}",
        )
    try:
        server = await loop.create_server(gateway.connection, host, port, backlog=2048, reuse_port=several or None)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        log.error("port %d on %s is taken; choose another with --listen", port, host)
        return ADDRESS_IN_USE
    stopping = asyncio.Event()
    hurrying = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: hurrying.set() if stopping.is_set() else stopping.set())
    keeping = [
        feed.follow(),
        gateway.sweep(),
        gateway.watch_replicas().run(),
        gateway.scrape_replicas().run(),
        books.keep(),
        rulings.keep(),
        gateway.tell_load(partial(feed.report, "/v1/gateway/load")),
        gateway.rations.keep(partial(feed.ask, "/v1/gateway/shares", limit=_SHARES_LIMIT)),
        rulings.deliver(partial(feed.report, "/v1/gateway/rulings")),
        books.deliver(partial(feed.report, "/v1/gateway/usage")),
    ]
    if gateway.siblings is not None:
        keeping.insert(0, gateway.siblings.keep())
    if gateway.tracer is not None:
        keeping.insert(0, gateway.tracer.run())
    tasks = [loop.create_task(one) for one in keeping]
    gc.freeze()
    gc.set_threshold(*_COLLECTED)
    log.info("serving on http://%s:%d", *server.sockets[0].getsockname()[:2])
    await asyncio.wait({loop.create_task(stopping.wait()), *tasks}, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        if task.done():
            task.result()  # none ever ends well
    server.close()
    drained = loop.create_task(gateway.drain(within_s=options.drain))
    await asyncio.wait({drained, loop.create_task(hurrying.wait())}, return_when=asyncio.FIRST_COMPLETED)
    for one, task, target in ((books, tasks[-1], "usage"), (rulings, tasks[-2], "rulings")):
        one.write()
        task.cancel()
        with contextlib.suppress(OSError):
            async with asyncio.timeout(1.0):
                while await one.hand_on(partial(feed.report, f"/v1/gateway/{target}")):
                    pass
        one.close()
    if gateway.tracer is not None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await gateway.tracer.flush()
    return 0


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"{listen!r} is not an address to listen on; write for example 127.0.0.1:7071")
    return host.strip("[]"), int(port)


def _hosts(listen: str, allowed: Sequence[str]) -> set[str]:
    return {"localhost", "127.0.0.1", "[::1]", f"[{listen}]" if ":" in listen else listen, *allowed}


def _pepper(path: Path) -> bytes:
    """The key in its 0600 file, as the control plane wrote it. Raises: ValueError when others can read it."""
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ValueError(f"{path} is readable by others; run chmod 600 {path}")
    return bytes.fromhex(path.read_text().strip())


def _raise_file_limit() -> int:
    """The number of client connections that leaves room for as many upstream ones."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return max(16, wanted // 2 - 64)


if __name__ == "__main__":
    os.umask(0o077)
    sys.exit(main())
