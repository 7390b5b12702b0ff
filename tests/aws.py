"""EC2 for tests: moto's server on loopback, and in front of it a door that loses, breaks and refuses on request."""

from __future__ import annotations

import logging
import threading
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.error import HTTPError
from urllib.parse import parse_qs

import boto3
from moto.server import ThreadedMotoServer

from tidemill.clouds.ec2 import Ec2, Ec2Settings
from tidemill.model.cloud import Market, Offer

REGION = "eu-west-1"
KEYS = {"aws_access_key_id": "test", "aws_secret_access_key": "test"}
_ERROR = (
    "<Response><Errors><Error><Code>{}</Code><Message>{}</Message></Error></Errors><RequestID>r</RequestID></Response>"
)


class Aws:
    """An account with nothing in it. ``door`` is the address that a provisioner is given."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._moto.start()
        host, port = self._moto.get_host_and_port()
        self.url = f"http://{host}:{port}"
        self.ec2 = boto3.client("ec2", region_name=REGION, endpoint_url=self.url, **KEYS)
        self.door = Door(self.url)
        self.image = self.ec2.describe_images(Owners=["099720109477"])["Images"][0]["ImageId"]

    def reset(self) -> None:
        """Empty the account."""
        self.door.faults.clear()
        self.door.calls.clear()
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/moto-api/reset", method="POST")).close()

    def close(self) -> None:
        self.door.close()
        self._moto.stop()

    def settings(self, **changes: Any) -> Ec2Settings:
        known: dict[str, Any] = {
            "region": REGION,
            "image": self.image,
            "instance_types": ("g4dn.xlarge", "m5.large"),
            "prices": {"g4dn.xlarge": 587_000},
            "endpoint_url": self.door.url,
        }
        return Ec2Settings(**(known | changes))

    def provisioner(self, installation: str = "check", **changes: Any) -> Ec2:
        return Ec2(self.settings(**changes), installation=installation)

    def stranger(self) -> str:
        """An instance that somebody else rented."""
        made = self.ec2.run_instances(ImageId=self.image, InstanceType="t3.micro", MinCount=1, MaxCount=1)
        return str(made["Instances"][0]["InstanceId"])

    def end(self, instance_id: str) -> None:
        self.ec2.terminate_instances(InstanceIds=[instance_id])

    def alive(self, instance_id: str) -> bool:
        return instance_id in self.living()

    def living(self) -> set[str]:
        """What is pending or running in the account, whoever rented it."""
        return {
            one["InstanceId"]
            for part in self.ec2.describe_instances()["Reservations"]
            for one in part["Instances"]
            if one["State"]["Name"] in ("pending", "running")
        }

    def described(self, instance_id: str) -> dict[str, Any]:
        return self.ec2.describe_instances(InstanceIds=[instance_id])["Reservations"][0]["Instances"][0]

    def attribute(self, instance_id: str, name: str) -> str:
        found = self.ec2.describe_instance_attribute(InstanceId=instance_id, Attribute=name)
        return found[name[0].upper() + name[1:]]["Value"]


class Door:
    """Forwards to moto what EC2 is asked. ``faults`` are by the name of an action, taken one at a time.

    A fault is ``before`` (the line breaks and nothing is done), ``after`` (it is done, and the answer is lost), or the
    code of an error with which it is answered.
    """

    def __init__(self, url: str) -> None:
        self.faults: dict[str, list[str]] = {}
        self.calls: list[tuple[str, dict[str, list[str]]]] = []
        self.before: Callable[[str], None] = lambda _action: None
        door = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                form = parse_qs(body.decode())
                action = form.get("Action", [""])[0]
                door.calls.append((action, form))
                waiting = door.faults.get(action) or [""]
                fault = waiting.pop(0)
                if fault == "before":
                    self.close_connection = True
                    return
                if fault not in ("", "after"):
                    status = 503 if fault in ("RequestLimitExceeded", "ServiceUnavailable") else 400
                    self._answer(status, _ERROR.format(fault, f"{fault}, as the test wants").encode(), "text/xml")
                    return
                asked = urllib.request.Request(url + self.path, body, dict(self.headers), method="POST")
                try:
                    with urllib.request.urlopen(asked) as answer:
                        status, content, kind = answer.status, answer.read(), answer.headers.get("Content-Type", "")
                except HTTPError as error:
                    status, content, kind = error.code, error.read(), error.headers.get("Content-Type", "")
                if fault == "after":
                    self.close_connection = True
                    return
                self._answer(status, content, kind)

            def _answer(self, status: int, content: bytes, kind: str) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def count(self, action: str) -> int:
        """How often EC2 was asked for that."""
        return sum(name == action for name, _ in self.calls)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def gpu_offer(offers: tuple[Offer, ...], market: Market = Market.ON_DEMAND) -> Offer:
    return next(offer for offer in offers if offer.gpu_count and offer.market is market)
