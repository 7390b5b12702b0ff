"""The variables of a worker that only its machine knows, on top of those that the control plane gave."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

SYSTEM_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def worker_environment(
    spec: Mapping[str, Any],
    *,
    folders: Mapping[str, Path],
    temporary: str,
    secrets: Mapping[str, str],
    virtual_env: Path | None,
    python_bin: Path | None,
) -> dict[str, str]:
    """All variables of the worker of that launch. ``folders``: home, cache, checkpoint, output, scratch, input.

    What the machine decides (folders, devices, ports) wins over the given; defaults such as LANG do not.
    """
    given = {str(name): str(value) for name, value in spec.get("environment_variables") or ()}
    cpus = max(1, int(spec.get("cpu_milli") or 0) // 1_000)
    defaults = {
        "LANG": "C.UTF-8",
        "SHELL": "/bin/bash",
        "USER": "worker",
        "LOGNAME": "worker",
        "TERM": "xterm-256color",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(cpus),
        "TMPDIR": temporary,
    }
    machine = {
        "TIDEMILL_LAUNCH_ID": str(spec["launch_id"]),
        "HOME": str(folders["home"]),
        "XDG_CACHE_HOME": str(folders["cache"]),
        "TIDEMILL_CHECKPOINT_DIR": str(folders["checkpoint"]),
        "TIDEMILL_OUTPUT_DIR": str(folders["output"]),
        "TIDEMILL_SCRATCH_DIR": str(folders["scratch"]),
        "TIDEMILL_INPUT_DIR": str(folders["input"]),
        "CUDA_VISIBLE_DEVICES": ",".join(str(device) for device, _ in spec.get("devices") or ()),
        **_ports(spec),
    }
    if spec.get("job_token"):
        machine["TIDEMILL_TOKEN"] = str(spec["job_token"])
    path = [part for part in (given.get("PATH"), SYSTEM_PATH) if part][:1]
    if python_bin and str(python_bin) not in SYSTEM_PATH.split(":"):
        path.append(str(python_bin))
    if virtual_env:
        machine["VIRTUAL_ENV"] = str(virtual_env)
        path.insert(0, str(virtual_env / "bin"))
    return {**defaults, **given, **secrets, **machine, "PATH": ":".join(path)}


def _ports(spec: Mapping[str, Any]) -> dict[str, str]:
    ports: Sequence[Mapping[str, Any]] = spec.get("ports") or ()
    found = {
        "TIDEMILL_PORT_" + re.sub(r"[^A-Z0-9]", "_", str(port["name"]).upper()): str(port["number"]) for port in ports
    }
    service = spec.get("service") or {}
    main = next((port for port in ports if port["name"] == service.get("port")), ports[0] if ports else None)
    return found | ({"PORT": str(main["number"])} if main else {})
