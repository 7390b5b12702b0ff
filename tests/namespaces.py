"""Machines on one machine: network namespaces behind a bridge of their own, whose links can be cut and mended.

Nothing of the host's own network is touched: the bridge is in a namespace too. Needs root, ``ip`` of iproute2, and a
kernel that allows it; ``why_not`` says what is missing. A namespace is entered by thread, so what a test does inside
``Network.inside`` happens on that machine: its sockets, and the processes that it starts.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from functools import cache
from pathlib import Path

_NEWNET = 0x40000000
_FOLDER = Path("/run/netns")


@cache
def why_not(*programs: str) -> str:
    """Why there can be no network namespaces here, or a program is missing; empty when all is there."""
    for name, package in (("ip", "iproute2"), *((each, each) for each in programs)):
        if not _program(name):
            return f"{name} is not installed: apt install {package}"
    if os.geteuid() != 0:
        return "network namespaces are made by root only"
    network = Network()
    try:
        network.add("one")
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted here: {error.stderr.strip()}"
    finally:
        network.close()
    return ""


class Network:
    """A bridge, and the machines on it. Addresses are 10.77.0.1 and up, in the order in which machines are added."""

    def __init__(self) -> None:
        self._tag = f"tm{uuid.uuid4().hex[:6]}"
        self._addresses: dict[str, str] = {}
        self._made: list[str] = []

    def add(self, name: str) -> str:
        """The address of a new machine on the bridge. Raises: CalledProcessError."""
        if not self._made:
            self._make("hub")
            _run("ip", "-n", self._name("hub"), "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._name("hub"), "link", "set", "bridge", "up")
        address = f"10.77.0.{len(self._addresses) + 1}"
        self._make(name)
        self._join(name, "eth0", "hub", name)
        _run("ip", "-n", self._name("hub"), "link", "set", name, "master", "bridge")
        _run("ip", "-n", self._name(name), "address", "add", f"{address}/24", "dev", "eth0")
        self._addresses[name] = address
        return address

    def add_behind(self, router: str, name: str) -> str:
        """The address of a new machine that reaches the others through ``router`` only, by whose address it is known
        there: connections go out, and none comes in. Raises: CalledProcessError."""
        self._make(name)
        self._join(name, "eth0", router, "inner")
        inside, outside = self._name(name), self._name(router)
        _run("ip", "-n", outside, "address", "add", "192.168.77.1/24", "dev", "inner")
        _run("ip", "-n", inside, "address", "add", "192.168.77.2/24", "dev", "eth0")
        _run("ip", "-n", inside, "route", "add", "default", "via", "192.168.77.1")
        with self.inside(router):
            Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
            for rule in (
                "-t nat -A POSTROUTING -o eth0 -j MASQUERADE",
                "-P FORWARD DROP",
                "-A FORWARD -i inner -o eth0 -j ACCEPT",
                "-A FORWARD -i eth0 -o inner -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
                "-P INPUT DROP",
            ):
                _run("iptables", *rule.split())
        return "192.168.77.2"

    def refuse_inbound(self, name: str) -> None:
        """From now on nobody reaches that machine who was not asked by it. Raises: CalledProcessError."""
        with self.inside(name):
            _run("iptables", "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
            _run("iptables", "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED,RELATED", "-j", "ACCEPT")
            _run("iptables", "-P", "INPUT", "DROP")

    def cut(self, name: str) -> None:
        """Take the link of a machine down: nothing comes and nothing goes, and nobody is told."""
        _run("ip", "-n", self._name("hub"), "link", "set", name, "down")

    def mend(self, name: str) -> None:
        """Put the link up again."""
        _run("ip", "-n", self._name("hub"), "link", "set", name, "up")

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """This thread is on that machine meanwhile, and so is what it starts."""
        before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        there = os.open(_FOLDER / self._name(name), os.O_RDONLY | os.O_CLOEXEC)
        try:
            _enter(there)
            try:
                yield
            finally:
                _enter(before)
        finally:
            os.close(there)
            os.close(before)

    def close(self) -> None:
        """Remove all of it. What still runs there goes on, without a network."""
        for name in reversed(self._made):
            subprocess.run([_program("ip"), "netns", "del", self._name(name)], check=False, capture_output=True)
        self._made.clear()

    def _make(self, name: str) -> None:
        _run("ip", "netns", "add", self._name(name))
        self._made.append(name)
        _run("ip", "-n", self._name(name), "link", "set", "lo", "up")

    def _join(self, one: str, its_end: str, other: str, its_other_end: str) -> None:
        """A cable between two machines, named differently at its two ends."""
        first, second = self._name(one), self._name(other)
        _run("ip", "-n", first, "link", "add", its_end, "type", "veth", "peer", "name", its_other_end, "netns", second)
        _run("ip", "-n", first, "link", "set", its_end, "up")
        _run("ip", "-n", second, "link", "set", its_other_end, "up")

    def _name(self, name: str) -> str:
        return f"{self._tag}-{name}"


def _enter(namespace: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, _NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _run(*command: str) -> None:
    program = _program(command[0]) or command[0]
    subprocess.run([program, *command[1:]], check=True, capture_output=True, text=True, timeout=30)


def _program(name: str) -> str:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") or ""


@cache
def standin_driver(folder: Path) -> str:
    """The folder of a driver library for machines without GPUs, to be put into LD_LIBRARY_PATH; empty without a C
    compiler. It shows as many as STANDIN_GPUS says, named after STANDIN_NAME."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return ""
    folder.mkdir(parents=True, exist_ok=True)
    source, library = Path(__file__).with_name("nvml_standin.c"), folder / "libnvidia-ml.so.1"
    _run(compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(source))
    return str(folder)
