"""The API's certificate: which files are refused, who is spoken to how, renewal, joining, and handing on."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.cloud import Cloud, eventually
from tidemill.api.standby import Standby
from tidemill.api.tls import Certificate
from tidemill.control.settings import load_settings
from tidemill.errors import InvalidRequest, InvalidSetting, Unauthorized, Unavailable
from tidemill.outpost import joining
from tidemill.outpost.config import OutpostConfig
from tidemill.sdk import Client
from tidemill.sdk.transport import Transport

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


class Authority:
    """Makes certificates; ``pem`` is its own."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
        self.pem = self.made(self.name, self.key.public_key(), authority=True).public_bytes(serialization.Encoding.PEM)

    def made(
        self, subject: x509.Name, key: Any, *, names: tuple[str, ...] = (), begins: datetime = NOW - DAY,
        ends: datetime = NOW + DAY, authority: bool = False,
    ) -> x509.Certificate:  # fmt: skip
        builder = (
            x509.CertificateBuilder().subject_name(subject).issuer_name(self.name).public_key(key)
            .serial_number(x509.random_serial_number()).not_valid_before(begins).not_valid_after(ends)
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )  # fmt: skip
        if names:
            builder = builder.add_extension(x509.SubjectAlternativeName([_name(one) for one in names]), critical=False)
        return builder.sign(self.key, hashes.SHA256())

    def write(self, folder: Path, *names: str, **about: Any) -> tuple[Path, Path]:
        """The files of a new certificate for these names, and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a control plane")])
        made = self.made(subject, key.public_key(), names=names, **about)
        return _write(folder, made.public_bytes(serialization.Encoding.PEM), key)


def _name(text: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        return x509.DNSName(text)


def _write(folder: Path, pem: bytes, key: ec.EllipticCurvePrivateKey) -> tuple[Path, Path]:
    folder.mkdir(exist_ok=True)
    cert_file, key_file = folder / "cert.pem", folder / "key.pem"
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for path, content in ((cert_file, pem), (key_file, encoded)):
        draft = path.with_suffix(".new")
        draft.write_bytes(content)
        draft.chmod(0o600)
        draft.replace(path)
    return cert_file, key_file


def self_signed(folder: Path, *names: str) -> tuple[Path, Path]:
    """A certificate that vouches for itself."""
    own = Authority()
    made = own.made(own.name, own.key.public_key(), names=names, authority=True)
    return _write(folder, made.public_bytes(serialization.Encoding.PEM), own.key)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


# --- files ---


def test_a_good_pair_is_taken(authority: Authority, tmp_path: Path):
    for name in ("10.0.0.5", "head.example", "a.wild.example", "HEAD.example", ""):
        made = Certificate(*authority.write(tmp_path, "10.0.0.5", "head.example", "*.wild.example"), name=name)
        assert made.fingerprint == ""  # an authority vouches for it
    assert made.authority == ""
    (tmp_path / "cert.pem").write_bytes((tmp_path / "cert.pem").read_bytes() + authority.pem)
    assert Certificate(tmp_path / "cert.pem", tmp_path / "key.pem").authority.encode() == authority.pem
    own = Certificate(*self_signed(tmp_path, "head.example"))
    assert own.fingerprint.startswith("sha256:")
    assert own.authority == (tmp_path / "cert.pem").read_text()


def spoil(kind: str, authority: Authority, folder: Path) -> tuple[Path, Path]:
    cert, key = authority.write(folder, "10.0.0.5")
    match kind:
        case "no certificate":
            cert.unlink()
        case "no key":
            key.unlink()
        case "not a certificate":
            cert.write_text("words")
        case "not a key":
            key.write_text("words")
        case "a key with a password":
            own = ec.generate_private_key(ec.SECP256R1())
            form = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8)
            key.write_bytes(own.private_bytes(*form, serialization.BestAvailableEncryption(b"x")))
        case "another key":
            other = authority.write(folder / "other", "10.0.0.5")[1]
            key.write_bytes(other.read_bytes())
        case "a key that all may read":
            key.chmod(0o644)
        case "ended":
            cert, key = authority.write(folder, "10.0.0.5", begins=NOW - 3 * DAY, ends=NOW - 2 * DAY)
        case "not begun":
            cert, key = authority.write(folder, "10.0.0.5", begins=NOW + DAY, ends=NOW + 2 * DAY)
        case "for another":
            cert, key = authority.write(folder, "10.0.0.6", "head.example")
        case "for nobody":
            cert, key = authority.write(folder)
    return cert, key


@pytest.mark.parametrize(
    ("kind", "setting", "said"),
    [
        ("no certificate", "tls_cert", "No such file"),
        ("no key", "tls_key", "No such file"),
        ("not a certificate", "tls_cert", "no certificate"),
        ("not a key", "tls_key", "no key"),
        ("a key with a password", "tls_key", "password"),
        ("another key", "tls_key", "not that of the certificate"),
        ("a key that all may read", "tls_key", "All users"),
        ("ended", "tls_cert", "ended at"),
        ("not begun", "tls_cert", "begins at"),
        ("for another", "tls_cert", "for head.example, 10.0.0.6, not for 10.0.0.5"),
        ("for nobody", "tls_cert", "for nobody"),
    ],
)
def test_wrong_files_are_refused_by_setting_file_and_mend(kind, setting, said, authority: Authority, tmp_path: Path):
    cert, key = spoil(kind, authority, tmp_path)
    with pytest.raises(InvalidSetting, match=said) as refused:
        Certificate(cert, key, name="10.0.0.5")
    assert (refused.value.field, refused.value.value) == (setting, str(cert if setting == "tls_cert" else key))
    assert refused.value.mend


def test_one_file_without_the_other_is_refused(tmp_path: Path):
    for given, missing in (("tls_cert", "tls_key"), ("tls_key", "tls_cert")):
        with pytest.raises(InvalidSetting) as refused:
            load_settings(tmp_path, {given: "/a/b.pem"})
        assert refused.value.field == missing
    with pytest.raises(InvalidSetting, match="whole path"):
        load_settings(tmp_path, {"tls_cert": "b.pem", "tls_key": "/c.pem"})


def test_new_files_are_used_and_bad_ones_are_not(authority: Authority, tmp_path: Path):
    cert, key = authority.write(tmp_path, "10.0.0.5")
    made = Certificate(cert, key, name="10.0.0.5")
    before = made._chain
    authority.write(tmp_path, "10.0.0.6")
    made.refresh()
    assert made._chain == before
    authority.write(tmp_path, "10.0.0.5")
    made.refresh()
    assert made._chain != before


# --- a cloud ---


@pytest.fixture(scope="module")
def cloud(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    folder = tmp_path_factory.mktemp("cloud")
    cert, key = authority.write(folder / "tls", "127.0.0.1")
    made = Cloud(
        folder / "home", host="0.0.0.0", address="127.0.0.1", tls_cert=str(cert), tls_key=str(key), engine="none"
    )
    made.up()
    try:
        yield made
    finally:
        made.down()


def serial(port: int) -> int:
    pem = ssl.get_server_certificate(("127.0.0.1", port), timeout=10)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def test_a_cloud_speaks_tls_to_others_and_renews(cloud: Cloud, authority: Authority, tmp_path: Path, monkeypatch):
    tls, url = Path(cloud.settings["tls_cert"]).parent, f"https://127.0.0.1:{cloud.port}"
    with pytest.raises(Unavailable, match="not certain"):
        Client(url, cloud.token, retry_for_s=0).status()
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    for ca in (str(tmp_path / "ca.pem"), authority.pem.decode()):
        monkeypatch.setenv("TIDEMILL_API_CA", ca)
        with Client(url, cloud.token) as client:
            assert client.status().version
    assert cloud.call("GET", "/v1/status")[0] == 200  # this machine itself
    if elsewhere := an_address():
        with socket.create_connection((elsewhere, cloud.port), source_address=("127.0.0.1", 0), timeout=10) as other:
            other.sendall(b"GET /v1/healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            assert b"speaks https, not http." in other.recv(4_096)
    before = serial(cloud.port)
    authority.write(tls, "127.0.0.1")
    assert serial(cloud.port) != before
    (tls / "cert.pem").write_text("half a certific")
    with Client(url, cloud.token) as client:
        assert client.status().version
    monkeypatch.setenv("TIDEMILL_API_CA", "words")
    with pytest.raises(InvalidRequest):
        Client(url, cloud.token)


def an_address() -> str:
    """An address of this machine that is no loopback; empty when it has none."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])
    return ""


def test_a_machine_joins_whom_it_can_be_certain_of(cloud: Cloud, authority: Authority, tmp_path: Path):
    home, url = tmp_path / "outpost", f"https://127.0.0.1:{cloud.port}"
    _, made = cloud.call("POST", "/v1/sites/local/tokens", {})
    assert (made["url"], made["fingerprint"]) == (url, "")  # an authority vouches for it
    asked = OutpostConfig(control_url=url, key="", node_id="", name="far", address="127.0.0.1")
    with pytest.raises(Unauthorized, match="not certain"):
        joining.join(home, made["token"], asked)
    (tmp_path / "ca.pem").write_bytes(authority.pem)
    config = joining.join(home, made["token"], replace(asked, ca=joining.vouching(url, ca=tmp_path / "ca.pem")))
    try:
        joining.start_outpost(home)
        nodes = eventually(lambda: cloud.call("GET", "/v1/nodes")[1]["items"], within_s=30, what="it is there")
        assert [node["name"] for node in nodes] == [config.name]
        job = cloud.submit({"name": "asks", "run": ASKS, "resources": {"cpus": 0.1}})
        ended = cloud.wait(job, within_s=60)
        assert ended["state"] == "succeeded", cloud.logs(job)
    finally:
        joining.stop_outpost(home)


ASKS = r"""exec python3 -c '
import json, os, ssl, urllib.request
url = os.environ["TIDEMILL_API_URL"] + "/v1/jobs/" + os.environ["TIDEMILL_JOB_ID"]
asked = urllib.request.Request(url, headers={"Authorization": "Bearer " + os.environ["TIDEMILL_TOKEN"]})
trusted = ssl.create_default_context(cadata=os.environ["TIDEMILL_API_CA"])
assert json.load(urllib.request.urlopen(asked, context=trusted))["name"] == "asks"
'"""
"""A job that asks for itself, with what a job is told and nothing else."""


@pytest.mark.parametrize(
    ("url", "given", "field"),
    [
        ("http://127.0.0.1:1", {"fingerprint": f"sha256:{'0' * 64}"}, "host"),
        ("https://127.0.0.1:1", {"fingerprint": "abc"}, "fingerprint"),
        ("https://127.0.0.1:1", {"ca": Path("/nowhere.pem")}, "ca"),
        ("https://127.0.0.1:1", {"ca": Path(__file__)}, "ca"),
    ],
)
def test_what_cannot_vouch_is_refused(url, given, field):
    with pytest.raises(InvalidRequest) as refused:
        joining.vouching(url, **given)
    assert refused.value.field == field


def test_a_certificate_that_vouches_for_itself_is_known_by_its_fingerprint(tmp_path: Path):
    certificate = Certificate(*self_signed(tmp_path, "127.0.0.1"))
    with leader(certificate) as url:
        vouches = joining.vouching(url, fingerprint=certificate.fingerprint)
        assert Transport(url, "t", ca=vouches).post("/echo", {"a": 1}) == {"a": 1}
        with pytest.raises(Unauthorized, match=certificate.fingerprint):
            joining.vouching(url, fingerprint=f"sha256:{'0' * 64}")


# --- standing by ---


@contextlib.contextmanager
def leader(certificate: Certificate) -> Iterator[str]:
    """The address of a server that says what it was asked, over TLS."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = certificate.context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_who_stands_by_hands_on_what_is_encrypted_and_what_this_machine_asks(scheme, authority: Authority, tmp_path):
    certificate = Certificate(*authority.write(tmp_path, "127.0.0.1"), name="127.0.0.1")
    with leader(certificate) as url, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        standby = Standby(listener, lambda: url, certificate=certificate)
        standby.start()
        own = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        http = Transport(own, "t", ca=authority.pem.decode())
        body = {"words": "w" * 100_000}
        try:
            assert eventually(lambda: http.post("/echo", body), within_s=10, what="it is handed on") == body
        finally:
            http.close()
            standby.close()
