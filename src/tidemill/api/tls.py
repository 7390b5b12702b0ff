"""The certificate of the API, and how connections come in where there is one.

The same port then speaks TLS to whoever asks for it, and HTTP to this machine itself: to its command line, its gateway
and its runners, which nobody listens to in between. From elsewhere nothing but TLS is answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ipaddress
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from tidemill.errors import InvalidSetting

log = logging.getLogger(__name__)
HELLO: Final = b"\x16"
"""What a TLS connection begins with, and HTTP never does."""
BACKLOG: Final = 2_048
PATIENCE_S: Final = 10.0
"""For a connection to say its first word, and to agree on keys."""
_FULL_S: Final = 0.1
_ASKED: Final = 1 << 16
REFUSAL: Final = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain\r\nconnection: close\r\ncontent-length: 37\r\n\r\n"
    b"This address speaks https, not http.\n"
)


class Certificate:
    """A certificate and its key, checked: ``context`` for servers, which has the files' newest good content.

    ``name`` is one under which the API is reached, an address or a host's name; empty: none is known.
    Raises: InvalidSetting that names the setting, the file and the mend.
    """

    def __init__(self, cert: Path, key: Path, *, name: str = "", now: datetime | None = None) -> None:
        self._cert = cert
        self._key = key
        self._name = name
        self._stamp = self._look()
        self._chain = _check(cert, key, name=name, now=now or datetime.now(UTC))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.load_cert_chain(cert, key)

    @property
    def fingerprint(self) -> str:
        """The SHA-256 of the certificate, when it vouches for itself: empty when an authority does."""
        leaf = self._chain[0]
        if leaf.issuer != leaf.subject:
            return ""
        return f"sha256:{hashlib.sha256(leaf.public_bytes(serialization.Encoding.DER)).hexdigest()}"

    @property
    def authority(self) -> str:
        """What vouches for it in the end, as PEM, when the file has that; empty: what all machines trust should."""
        last = self._chain[-1]
        return last.public_bytes(serialization.Encoding.PEM).decode() if last.issuer == last.subject else ""

    @property
    def client_context(self) -> ssl.SSLContext:
        """For connections to those that stand in for this one: it trusts what this one shows, beside what all trust."""
        context = ssl.create_default_context(cafile=None)
        context.load_verify_locations(cafile=self._cert)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context

    def refresh(self) -> None:
        """Read the files anew when they changed. What is wrong with them is logged, and the old content stays."""
        stamp = self._look()
        if stamp == self._stamp:
            return
        try:
            chain = _check(self._cert, self._key, name=self._name, now=datetime.now(UTC))
            self.context.load_cert_chain(self._cert, self._key)
        except (InvalidSetting, OSError) as error:
            log.error("the new certificate is not used: %s", error)
        else:
            self._chain = chain
            log.info("the certificate was renewed; it ends at %s", chain[0].not_valid_after_utc.isoformat())
        self._stamp = stamp

    def _look(self) -> tuple[tuple[int, int], ...]:
        found = []
        for path in (self._cert, self._key):
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((status.st_mtime_ns, status.st_ino))
        return tuple(found)


class Entry:
    """Accepts connections on ``listener`` for protocols that ``make`` makes, until ``close``; runs in an event loop."""

    def __init__(self, listener: socket.socket, certificate: Certificate, make: Callable[[], asyncio.Protocol]) -> None:
        self._listener = listener.dup()
        self._listener.setblocking(False)
        self._listener.listen(BACKLOG)
        self._certificate = certificate
        self._make = make
        self._entering: set[asyncio.Task[None]] = set()
        self._accepting = asyncio.ensure_future(self._accept())

    def close(self) -> None:
        """Accept nobody any more; harmless twice."""
        self._accepting.cancel()
        for task in self._entering:
            task.cancel()
        self._listener.close()

    async def wait_closed(self) -> None:
        """Nothing, once nobody is about to enter any more."""
        await asyncio.gather(self._accepting, *self._entering, return_exceptions=True)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # such as too many open files: others may be closed in a moment
                log.warning("a connection was not accepted: %s", error)
                await asyncio.sleep(_FULL_S)
                continue
            task = asyncio.ensure_future(self._enter(connection))
            self._entering.add(task)
            task.add_done_callback(self._entering.discard)

    async def _enter(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        connection.setblocking(False)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            first = await asyncio.wait_for(_first_octet(connection), PATIENCE_S)
            if first == HELLO:
                self._certificate.refresh()
                await loop.connect_accepted_socket(
                    self._make, connection, ssl=self._certificate.context, ssl_handshake_timeout=PATIENCE_S
                )
            elif first and is_own(connection.getpeername(), connection.getsockname()):
                await loop.connect_accepted_socket(self._make, connection)
            else:
                if first:
                    connection.recv(_ASKED)  # what is unread at closing would take the answer with it
                    connection.send(REFUSAL)
                connection.close()
        except (OSError, TimeoutError, asyncio.CancelledError) as error:
            log.debug("a connection did not come about: %s", error)
            connection.close()


def is_own(peer: Any, own: Any) -> bool:
    """Whether both ends of a connection, as sockets name them, are on this machine.

    >>> is_own(("127.0.0.1", 5), ("127.0.0.1", 7070)), is_own(("10.0.0.5", 5), ("10.0.0.5", 7070))
    (True, True)
    >>> is_own(("10.0.0.6", 5), ("10.0.0.5", 7070)), is_own(("10.0.0.5", 5), ("127.0.0.1", 7070))
    (False, False)
    """
    return bool(peer[0] == own[0])


async def _first_octet(connection: socket.socket) -> bytes:
    """What the other side sends first, left there to be read; empty when it hung up."""
    loop = asyncio.get_running_loop()
    there = asyncio.Event()
    loop.add_reader(connection, there.set)
    try:
        await there.wait()
    finally:
        loop.remove_reader(connection)
    return connection.recv(1, socket.MSG_PEEK)


def _check(cert: Path, key: Path, *, name: str, now: datetime) -> list[x509.Certificate]:
    """The certificates of the file, its own first. Raises: InvalidSetting."""
    whole = "Give the certificate as PEM, with those of its authorities after it."
    try:
        chain = x509.load_pem_x509_certificates(cert.read_bytes())
    except OSError as error:
        raise _wrong("tls_cert", cert, f"The certificate cannot be read: {error.strerror}.", whole) from None
    except ValueError as error:
        raise _wrong("tls_cert", cert, f"The file holds no certificate: {error}.", whole) from None
    leaf = chain[0]
    try:
        private = serialization.load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise _wrong("tls_key", key, f"The key cannot be read: {error.strerror}.", "Give its key as PEM.") from None
    except (ValueError, TypeError) as error:
        mend = "Give its key as PEM, without a password."
        raise _wrong("tls_key", key, f"The file holds no key that can be used: {error}.", mend) from None
    if key.stat().st_mode & 0o007:
        raise _wrong("tls_key", key, "All users of this machine may read the key.", f"Run chmod o= {key}.")
    form = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if private.public_key().public_bytes(*form) != leaf.public_key().public_bytes(*form):
        mend = "Give the two that belong together."
        raise _wrong("tls_key", key, f"The key is not that of the certificate in {cert}.", mend)
    if leaf.not_valid_after_utc <= now:
        ended = leaf.not_valid_after_utc.isoformat(" ", "minutes")
        raise _wrong("tls_cert", cert, f"The certificate ended at {ended}.", "Renew it.")
    if leaf.not_valid_before_utc > now:
        begins = leaf.not_valid_before_utc.isoformat(" ", "minutes")
        mend = "See that this machine's clock is right."
        raise _wrong("tls_cert", cert, f"The certificate begins at {begins}.", mend)
    names = list(_names(leaf))
    if name and not any(_covers(one, name) for one in names):
        mend = f"Have one made for {name}, or set address to a name that it has."
        raise _wrong("tls_cert", cert, f"The certificate is for {', '.join(names) or 'nobody'}, not for {name}.", mend)
    return chain


def _names(leaf: x509.Certificate) -> Iterator[str]:
    """The names and addresses that a certificate is for."""
    with contextlib.suppress(x509.ExtensionNotFound):
        found = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        yield from found.get_values_for_type(x509.DNSName)
        yield from (str(each) for each in found.get_values_for_type(x509.IPAddress))


def _covers(known: str, name: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name) == ipaddress.ip_address(known)
    known, name = known.lower(), name.lower()
    return known == name or (known.startswith("*.") and name.partition(".")[2] == known[2:])


def _wrong(setting: str, path: Path, sentence: str, mend: str) -> InvalidSetting:
    return InvalidSetting(sentence, field=setting, value=str(path), mend=mend)
