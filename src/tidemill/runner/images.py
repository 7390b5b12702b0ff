"""Workers in container images: which program runs them here, and the command line, script and process of one.

One container holds setup and run, so that what setup installs is there for run. Its first process is the
image's ``/bin/sh``, which gets everything on its standard input: variables, then what to run. So no value is on
a command line, in a file, or in what ``podman inspect`` shows. Marks in a folder that both sides see tell how
far it came. The container's user is the one whose files the folders are; it has no capabilities.

podman and docker limit memory, CPU and processes in control groups of their own. The container is a child of
podman's monitor or docker's daemon, so it outlives a runner that is killed: the engine then removes it by name.

Limits: an image needs ``/bin/sh``. GPUs are given by CDI (podman, after ``nvidia-ctk cdi generate``) and by
``--gpus`` (docker), and neither was tried on a machine with GPUs; nor was docker with a daemon. CPU time of
docker's containers is not counted. What is entered later (``exec``) has the container's namespaces, groups and
no capabilities either, but not its system call filter; a user who is not root cannot enter docker's.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tidemill.runner import cgroup, processes
from tidemill.runner.cell import Process
from tidemill.runner.sandbox import TMP, Support

_PROBE_S: Final = 5.0
_CALL_S: Final = 20.0
_MAX_PROCESSES: Final = 32_768
_LEAST_SHM: Final = 64 << 20
_MEND: Final = "apt install podman crun (or dnf install podman); without root also uidmap, and lines in /etc/subuid"
_KEPT: Final = re.compile(
    r"PATH|HOME|USER|LANG|TMPDIR|XDG_\w+|DBUS_SESSION_BUS_ADDRESS|REGISTRY_AUTH_FILE"
    r"|CONTAINERS_\w+|DOCKER_\w+|(?i:https?|no|all)_proxy|SSL_CERT_\w+"
)
_TRANSPORTS: Final = (
    "dir", "docker", "docker-archive", "docker-daemon", "oci", "oci-archive", "containers-storage", "ostree", "sif",
    "atomic", "tarball",
)  # fmt: skip
_TERM_TRAP: Final = """trap 'trap "" TERM; wait; exit 143' TERM; """


@dataclass(frozen=True, slots=True)
class Runtime:
    """The program that runs containers here; ``support`` says why there is none. ``prefix`` begins its command line.

    ``limits`` are the controllers with which it can limit: ``memory``, ``cpu``, ``pids``.
    """

    support: Support
    kind: str = ""
    prefix: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()

    @property
    def works(self) -> bool:
        """Whether images can be run."""
        return self.support.works

    def to_json(self) -> dict[str, Any]:
        """What ``from_json`` reads."""
        return {"kind": self.kind, "prefix": list(self.prefix), "limits": list(self.limits)}


def from_json(value: Mapping[str, Any]) -> Runtime:
    """The runtime that ``to_json`` wrote down."""
    kind = str(value["kind"])
    return Runtime(Support("container", True, kind), kind, tuple(value["prefix"]), tuple(value["limits"]))


def find_runtime(cache: Path | None = None) -> Runtime:
    """podman or docker, whichever answers, found by asking it. ``cache`` keeps the answer until the next reboot."""
    found = {kind: shutil.which(kind) or "" for kind in ("podman", "docker")}
    key = f"{found['podman']} {found['docker']} {processes.boot_id()} {os.geteuid()}"
    with contextlib.suppress(OSError, ValueError, KeyError):
        if cache and (known := json.loads(cache.read_text())).pop("key") == key:
            return from_json(known)
    reasons: list[str] = []
    for kind, probe in (("podman", _probe_podman), ("docker", _probe_docker)):
        if not found[kind]:
            reasons.append(f"{kind} is not installed")
            continue
        runtime = probe(found[kind])
        if runtime.works:
            if cache:
                with contextlib.suppress(OSError):
                    cache.write_text(json.dumps({"key": key, **runtime.to_json()}))
            return runtime
        reasons.append(runtime.support.detail)
        if runtime.support.mend:
            return Runtime(Support("container", False, "; ".join(reasons), runtime.support.mend))
    return Runtime(Support("container", False, "; ".join(reasons), _MEND))


def _no(detail: str, mend: str = "") -> Runtime:
    return Runtime(Support("container", False, detail, mend))


def _probe_podman(program: str) -> Runtime:
    code, out, err = _call([program, "info", "--format", "json"], _PROBE_S)
    try:
        host = json.loads(out)["host"] if not code else {}
    except (ValueError, KeyError):
        host = {}
    if not host:
        return _no(f"podman does not work: {err or 'its answer cannot be read'}")
    prefix = [program]
    if host.get("cgroupManager") == "systemd" and not Path("/run/systemd/system").exists():
        prefix.append("--cgroup-manager=cgroupfs")
    if dict(host.get("ociRuntime") or {}).get("name") == "crun" and _is_hybrid():
        if not shutil.which("runc"):
            return _no("podman's crun refuses control groups of versions 1 and 2 together", "apt install runc")
        prefix.append("--runtime=runc")
    found = host.get("cgroupControllers") or ()
    rootless_v1 = host.get("cgroupVersion") == "v1" and dict(host.get("security") or {}).get("rootless")
    limits = tuple(name for name in ("memory", "cpu", "pids") if name in found and not rootless_v1)
    return Runtime(Support("container", True, program), "podman", tuple(prefix), limits)


def _probe_docker(program: str) -> Runtime:
    code, _, err = _call([program, "info", "--format", "{{.ServerVersion}}"], _PROBE_S)
    if code:
        return _no(f"docker does not work: {err}")
    return Runtime(Support("container", True, program), "docker", (program,), ("memory", "cpu", "pids"))


def _is_hybrid(root: Path = Path("/sys/fs/cgroup")) -> bool:
    """Whether version 2 beside version 1 has controllers, which crun takes for a reason to refuse."""
    with contextlib.suppress(OSError):
        return bool((root / "unified" / "cgroup.controllers").read_text().strip())
    return False


def _call(command: Sequence[str], limit_s: float = _CALL_S) -> tuple[int, str, str]:
    """Exit status, output, and the end of what it complained."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False, cwd="/",
            env=_operators_variables(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, "", f"no answer within {limit_s:g} s"
    except OSError as error:
        return 127, "", str(error)
    return done.returncode, done.stdout.decode(errors="replace").strip(), done.stderr.decode(errors="replace")[-300:]


def _operators_variables() -> dict[str, str]:
    """What podman and docker themselves are told; nothing of a tenant's."""
    return {name: value for name, value in os.environ.items() if _KEPT.fullmatch(name)}


def refuse_image(image: str) -> str:
    """Why that cannot be the name of an image; empty when it can. Images come from registries, not from files."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._:/@+-]*", image):
        return "it is not the name of an image"
    if image.partition(":")[0] in _TRANSPORTS or ":/" in image:
        return "it is a place on this machine, not an image of a registry"
    return ""


def container_name(mark: str) -> str:
    """What the container of a launch is called."""
    return f"tidemill-{mark}"


def remove(runtime: Runtime, name: str) -> bool:
    """Whether there is no such container, after killing and removing it.

    To be called before its monitor is killed: podman waits in vain for that one's word, and removes only then.
    """
    _call([*runtime.prefix, "kill", "--signal", "KILL", name])
    for _ in range(2):
        _call([*runtime.prefix, "rm", "--force", "--volumes", name])
        code, out, _ = _call([*runtime.prefix, "ps", "--all", "--quiet", "--filter", f"name=^{name}$"])
        if not code and not out:
            return True
    return False


@dataclass(frozen=True, slots=True)
class Box:
    """What one container is given. Paths are the same inside and outside, but for ``temporary``, its ``/tmp``,
    and for ``placed`` and ``volumes``, folders put elsewhere, read-only and to be written.

    ``control`` is the folder of the marks ``begun`` and ``ready``; zero is no limit.
    """

    image: str
    mark: str
    cwd: Path
    control: Path
    writable: tuple[Path, ...] = ()
    readable: tuple[Path, ...] = ()
    placed: tuple[tuple[Path, str], ...] = ()
    volumes: tuple[tuple[Path, str], ...] = ()
    temporary: Path | None = None
    devices: tuple[str, ...] = ()
    memory_bytes: int = 0
    cpu_milli: int = 0
    pids: int = 0

    @property
    def begun(self) -> bool:
        """Whether its first process ran: it was not podman that failed."""
        return (self.control / "begun").exists()

    @property
    def ready(self) -> bool:
        """Whether setup is over and succeeded."""
        return (self.control / "ready").exists()


def arguments(runtime: Runtime, box: Box) -> list[str]:
    """The command line that runs the container; the script of ``script_for`` is to be its standard input.

    GPUs: CDI names for podman, ``--gpus`` for docker; not tried with either.
    """
    podman = runtime.kind == "podman"
    line = [
        *runtime.prefix, "run", "--rm", "--interactive", "--name", container_name(box.mark), "--label",
        f"tidemill={box.mark}", "--network", "host", "--pull", "missing", "--log-driver", "none",
        "--security-opt", "no-new-privileges", "--cap-drop", "all", "--user", _user(runtime), "--workdir",
        str(box.cwd), "--env", f"{processes.MARKER}={box.mark}", "--entrypoint", "/bin/sh",
    ]  # fmt: skip
    if podman:
        line += ["--pid", "private", "--http-proxy=false", "--no-healthcheck"]
    for name, number in (("nofile", resource.RLIMIT_NOFILE), ("nproc", resource.RLIMIT_NPROC)):
        hard = resource.getrlimit(number)[1]
        most = _MAX_PROCESSES if name == "nproc" else 1 << 20
        most = most if hard == resource.RLIM_INFINITY else min(hard, most)
        line += ["--ulimit", f"{name}={most}:{most}"]
    if box.memory_bytes and "memory" in runtime.limits:
        line += ["--memory", str(box.memory_bytes)]
    if box.cpu_milli and "cpu" in runtime.limits:
        line += ["--cpus", f"{box.cpu_milli / 1_000:g}"]
    if box.pids and "pids" in runtime.limits:
        line += ["--pids-limit", str(box.pids)]
    line += ["--shm-size", str(max(_LEAST_SHM, box.memory_bytes or 1 << 30))]
    mounts = [(path, path, "") for path in (*box.writable, box.control)]
    mounts += [(path, path, ",readonly") for path in box.readable]
    mounts += [(source, Path(place), ",readonly") for source, place in box.placed]
    mounts += [(source, Path(place), "") for source, place in box.volumes]
    mounts += [(box.temporary, Path(TMP), "")] if box.temporary else []
    for source, place, mode in sorted(mounts, key=lambda mount: len(mount[1].parts)):
        line += ["--mount", f"type=bind,{_quoted('source', source)},{_quoted('destination', place)}{mode}"]
    if box.devices and podman:
        line += [word for device in box.devices for word in ("--device", f"nvidia.com/gpu={device}")]
    elif box.devices:
        line += ["--gpus", f'"device={",".join(box.devices)}"']
    return [*line, box.image, "-s"]


def _quoted(name: str, path: Path) -> str:
    """A field of a mount, which is a line of comma-separated values."""
    field = f"{name}={path}"
    return '"{}"'.format(field.replace('"', '""')) if any(letter in field for letter in ',"') else field


def _user(runtime: Runtime) -> str:
    """Who inside the container owns our files: its root where we are, or podman maps us to, root."""
    return "0:0" if runtime.kind == "podman" else f"{os.geteuid()}:{os.getegid()}"


def script_for(box: Box, environment: Mapping[str, str], setup: str, run: str) -> bytes:
    """What the container's shell does: variables, setup, run; bash runs them where the image has it.

    The shell stays, as nothing but a handler lets SIGTERM reach a first process; it ends as its child does.
    """
    lines = ["{", "trap : TERM", f": > {shlex.quote(str(box.control / 'begun'))}"]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in environment.items() if name.isidentifier()]
    lines += ["exec < /dev/null"]
    if setup.strip():
        lines += [*_in_a_shell(setup), "code=$?", '[ "$code" = 0 ] || exit "$code"']
    lines += [f": > {shlex.quote(str(box.control / 'ready'))}", *_in_a_shell(run), "exit $?", "}", ""]
    return "\n".join(lines).encode(errors="surrogateescape")


def _in_a_shell(script: str) -> list[str]:
    text = shlex.quote(_TERM_TRAP + script)
    return [
        "if [ -x /bin/bash ]",
        f"then /bin/bash -euo pipefail -c {text}",
        f"else /bin/sh -eu -c {text}",
        "fi",
    ]


def variables(environment: Mapping[str, str], given: Iterable[str]) -> dict[str, str]:
    """The worker's variables without those for which the image knows better, unless they were ``given``."""
    wanted = set(given)
    return {
        name: value
        for name, value in environment.items()
        if name in wanted or name not in ("PATH", "SHELL", "USER", "LOGNAME")
    }


def client_variables(mark: str) -> dict[str, str]:
    """The variables of the program that starts the container; they are the operator's, never a tenant's."""
    return {**_operators_variables(), processes.MARKER: mark}


def describe(runtime: Runtime, box: Box) -> tuple[str, ...]:
    """What the worker really has, as ``name=value`` words."""
    limits = {
        "memory": f"{box.memory_bytes / 1e9:.4g}GB" if box.memory_bytes else "",
        "cpu": f"{box.cpu_milli / 1_000:g}" if box.cpu_milli else "",
        "pids": str(box.pids) if box.pids else "",
    }
    return (
        f"container={runtime.kind}",
        f"image={box.image}",
        "namespaces=mnt,pid,ipc",
        "network=host",
        *(f"{name}={value if value and name in runtime.limits else 'unlimited'}" for name, value in limits.items()),
        f"devices={len(box.devices)}",
    )


class ContainerProcess(Process):
    """The program that holds on to a container; ``leader`` is the container's first process."""

    def __init__(self, popen: subprocess.Popen[bytes], runtime: Runtime, name: str) -> None:
        super().__init__(popen, None, None)
        self._leader = 0
        self._runtime = runtime
        self._name = name

    @property
    def walled(self) -> bool:
        """It is in namespaces of its own."""
        return True

    @property
    def leader(self) -> int:
        """The first process as seen from outside, zero while there is none."""
        with self._lock:
            if not self._leader:
                _, out, _ = _call([*self._runtime.prefix, "inspect", "--format", "{{.State.Pid}}", self._name])
                self._leader = int(out) if out.isdigit() else 0
            return self._leader

    def terminate(self) -> None:
        """Ask what runs in the container to end; the one that gets the image, when nothing runs yet."""
        if self.popen.poll() is not None:
            return
        if not (leader := self.leader):
            self.popen.terminate()
            return
        try:
            os.killpg(leader, signal.SIGTERM)
        except OSError:
            _call([*self._runtime.prefix, "kill", "--signal", "TERM", self._name])

    def join(self) -> None:
        """Put this process into the container's control groups, as far as we may."""
        with contextlib.suppress(OSError):
            cgroup.groups_of(self._leader).join()

    def variables(self) -> dict[str, str]:
        """The image's own variables."""
        with contextlib.suppress(OSError):
            entries = Path(f"/proc/{self.leader}/environ").read_bytes().split(b"\0")
            return dict(os.fsdecode(entry).split("=", 1) for entry in entries if b"=" in entry)
        return {}
