"""What Kubernetes starts in a pod: the runner of the launch whose Secret is mounted there.

The cluster chose the devices, and maybe the node, so what depends on them is put into the launch here. A stop comes as
an annotation of the pod, which the kubelet shows as a file. How the worker ended is left in the container's termination
message: there it is for whoever asks the API server, also when the control plane cannot be reached.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tidemill.runner.folders import LaunchFolder, read_json, write_json
from tidemill.runner.main import prepare_process, run_launch
from tidemill.runner.slurmstep import addressed

ROOT: Final = Path("/tidemill")
WORD: Final = Path("/dev/termination-log")
_WORD_BYTES: Final = 4_000
"""The kubelet cuts what is longer than 4,096 bytes."""
_LOOK_S: Final = 0.25
_OWN: Final = ("POD_IP", "KUBERNETES_", "HOME", "HOSTNAME", "PWD", "OLDPWD", "SHLVL", "_")
"""Variables of the container that are not its image's."""
_DEVICES: Final = ("NVIDIA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")


def placed(spec: Mapping[str, Any], pod: Mapping[str, str]) -> dict[str, Any]:
    """The launch with what the cluster decided. ``pod`` are the variables of its container."""
    given = {str(name): str(value) for name, value in spec.get("environment_variables") or ()}
    settings = dict(spec["runner"])
    addresses = [str(each) for each in settings.get("addresses") or ()]
    found = addressed(given, addresses, int(spec["rank"])) if addresses else {}
    image = {name: value for name, value in pod.items() if not name.startswith(_OWN)}
    count = len(spec.get("devices") or ())
    settings |= {
        "uv": shutil.which("uv", path=pod.get("PATH")) or "",
        "python": sys.executable,
        "address": pod.get("POD_IP") or "127.0.0.1",
    }
    return {
        **spec,
        "runner": settings,
        "environment_variables": list({**image, **given, **found}.items()),
        "devices": [[name, 1_000] for name in device_names(count, pod)],
    }


def device_names(count: int, pod: Mapping[str, str]) -> Sequence[str]:
    """The devices that the worker sees, by the names that CUDA knows; by number where the cluster tells none."""
    for name in _DEVICES if count else ():
        told = [each for each in pod.get(name, "").split(",") if each not in ("", "all", "none", "void")]
        if len(told) == count and all("/" not in each and "=" not in each for each in told):
            return told
    return [str(number) for number in range(count)]


def word_of(ended: Mapping[str, Any] | None) -> str:
    """What is left in the termination message: how it ended, or that nothing was run; short enough to be kept."""
    if ended is None:
        return json.dumps({"detail": "the runner did not run it: another has the lease of this launch"})
    room = {**ended, "detail": str(ended.get("detail") or "")}
    while len(text := json.dumps(room)) > _WORD_BYTES:
        room["detail"] = room["detail"][: len(room["detail"]) // 2]
    return text


def watch_stop(told: Path, folder: LaunchFolder, ended: threading.Event) -> None:
    """Hand on each stop that comes for the pod, and have the runner look."""
    last = ""
    while not ended.is_set():
        text = _read(told)
        if text and text != last:
            last = text
            try:
                folder.write_stop(int(json.loads(text)["grace_ns"]))
            except (ValueError, KeyError, TypeError, OSError) as error:
                print(f"a stop could not be read: {text[:200]!r}: {error}", file=sys.stderr)
            else:
                os.kill(os.getpid(), signal.SIGTERM)
        ended.wait(_LOOK_S)


def main() -> None:
    """Run the launch that is mounted here, and end with its worker's status."""
    spec = read_json(ROOT / "launch" / "spec.json")
    if spec is None:
        sys.exit("the launch that should be mounted at /tidemill/launch cannot be read")
    print(f"{spec['launch_id']}: its output goes to tidemill logs {spec['job_id']}", flush=True)
    folder = LaunchFolder(ROOT / "home" / "launches" / str(spec["launch_id"]))
    folder.path.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_json(folder.spec, placed(spec, os.environ), durable=True)
    prepare_process(folder.diary)
    ended = threading.Event()
    arguments = (ROOT / "pod" / "stop", folder, ended)
    threading.Thread(target=watch_stop, args=arguments, name="stop", daemon=True).start()
    run_launch(folder.path, lambda: None)
    ended.set()
    how = read_json(folder.exit)
    WORD.write_text(word_of(how))
    sys.exit(int(how["exit_code"]) & 0xFF if how else 1)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
