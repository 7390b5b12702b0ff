"""A real Slurm cluster for tests: slurmctld and three slurmd on this machine, each with two GPUs that are stand-ins.

All nodes are in partition ``main``, the second and third in ``few`` as well.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cloud import free_port

NODES = ("n1", "n2", "n3")
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "srun", "scontrol")


def why_not() -> str:
    """Why no cluster can be started here; empty when one can."""
    missing = [name for name in _PROGRAMS if not _program(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian's slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "slurmd starts jobs as root only"


def why_no_accounting() -> str:
    """Why no cluster with accounting can be started here; empty when one can."""
    missing = [name for name in ("slurmdbd", "mariadbd", "mariadb-install-db", "sacct") if not _program(name)]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian's slurmdbd and mariadb-server)"
    return why_not()


def why_no_rest() -> str:
    """Why no slurmrestd can be started here; empty when one can."""
    return why_not() or ("" if _program("slurmrestd") else "not installed: slurmrestd (Debian's slurmrestd)")


def why_no_tokens() -> str:
    """Why slurmrestd cannot be used with tokens here; empty when it can."""
    if not list(Path("/usr/lib").glob("*/slurm*/auth_jwt.so")):
        return why_no_rest() or "not installed: Slurm's auth/jwt (Debian's slurm-wlm-jwt-plugin)"
    return why_no_rest()


def _program(name: str) -> str:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""


@dataclass
class Slurm:
    """The cluster. ``folder`` has its configuration; ``environment`` makes Slurm's commands talk to it."""

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, text: str | None = None) -> str:
        """What a command printed. Raises: CalledProcessError."""
        done = subprocess.run(
            command, input=text, env={**os.environ, **self.environment}, check=True, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        return done.stdout

    def start_controller(self) -> None:
        self.run(_program("slurmctld"), "-f", str(self.folder / "slurm.conf"))

    def start_rest(self, *plugins: str, port: int = 0) -> str:
        """The address of a new slurmrestd: on a socket as this user, or on a port, where it wants tokens.

        ``plugins`` are its versions; slurmrestd 22.05 does not start with those of slurmdbd where there is none.
        """
        at = f"127.0.0.1:{port}" if port else f"unix:{self.folder}/rest-{'-'.join(plugins)}"
        kind = {"SLURM_JWT": "daemon"} if port else {}
        security = {"SLURMRESTD_SECURITY": "disable_user_check"}
        with (self.folder / "log" / f"rest-{port}").open("ab") as log:
            daemon = subprocess.Popen(
                [_program("slurmrestd"), "-f", str(self.folder / "slurm.conf"), "-s", ",".join(plugins), "-a",
                 "rest_auth/jwt" if port else "rest_auth/local", at],
                env={**os.environ, **self.environment, **security, **kind}, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        until = time.monotonic() + 30
        while not _answers(at):
            if daemon.poll() is not None or time.monotonic() > until:
                raise RuntimeError((self.folder / "log" / f"rest-{port}").read_text())
            time.sleep(0.02)
        return f"http://{at}" if port else at

    def token(self) -> str:
        """A token of root, as ``scontrol`` prints it."""
        return self.run("scontrol", "token", "username=root", "lifespan=3600")

    def await_saved(self) -> None:
        """Until slurmctld has on its disk what it knows now: jobs that it forgets when killed, it ends as strangers."""
        now, until = time.time(), time.monotonic() + 30
        while (self.folder / "state" / "job_state").stat().st_mtime < now:
            if time.monotonic() > until:
                raise RuntimeError("slurmctld does not save its jobs")
            if time.time() > now + 6:
                self.run("scontrol", "reconfigure")
            time.sleep(0.1)

    def kill_controller(self) -> None:
        """kill -9 of slurmctld, and of nothing else."""
        os.kill(int((self.folder / "ctld.pid").read_text()), signal.SIGKILL)
        time.sleep(0.2)


@contextlib.contextmanager
def slurm_cluster(
    folder: Path,
    *,
    scheduler: str = "batch_sched_delay=0",
    accounting: bool = False,
    min_job_age_s: int = 300,
    cpus: int = 4,
) -> Iterator[Slurm]:
    """A cluster whose nodes are idle; afterwards nothing of it runs. ``scheduler`` are its SchedulerParameters: here
    Slurm does not let a new job wait for up to three seconds in case that more come. ``accounting`` has slurmdbd and a
    database keep what ended, with account ``ai`` and QOS ``fast``; only who has an account may submit then. Each node
    says that it has so many ``cpus``, and 500 MB for each."""
    for name in ("state", "spool", "log", "dev", "munge"):
        (folder / name).mkdir()
    (folder / "munge").chmod(0o700)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    (folder / "munge" / "jwt").write_bytes(os.urandom(32))
    (folder / "munge" / "jwt").chmod(0o600)
    made = Slurm(folder)
    accounts = _accounting_lines(folder, free_port()) if accounting else ""
    _write_configuration(folder, scheduler, min_job_age_s, accounts, cpus)
    try:
        munge = folder / "munge"
        words = [
            f"--{name}={munge / kind}"
            for name, kind in (
                ("socket", "sock"),
                ("key-file", "key"),
                ("pid-file", "pid"),
                ("log-file", "log"),
                ("seed-file", "seed"),
            )
        ]
        subprocess.run([_program("munged"), "--force", *words], check=True, capture_output=True)
        if accounting:
            _start_accounting(made)
        made.start_controller()
        if accounting:
            _make_accounts(made)
        for node in NODES:
            (folder / "spool" / node).mkdir()
            made.run(_program("slurmd"), "-N", node, "-f", str(folder / "slurm.conf"))
        until = time.monotonic() + 30
        while made.run("sinfo", "-h", "-o", "%T %D").split() != ["idle", str(len(NODES))]:
            if time.monotonic() > until:
                raise RuntimeError(made.run("sinfo", "-N", "-l"))
            time.sleep(0.05)
        yield made
    finally:
        _end_all_of(folder)


def _write_configuration(folder: Path, scheduler: str, min_job_age_s: int, accounts: str, cpus: int) -> None:
    host = socket.gethostname().partition(".")[0]
    ports = [free_port() for _ in NODES]
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={500 * cpus} Gres=gpu:h100:2 State=UNKNOWN"
        for node, port in zip(NODES, ports, strict=True)
    )
    tokens = "" if why_no_tokens() else f"AuthAltTypes=auth/jwt\nAuthAltParameters=jwt_key={folder}/munge/jwt"
    (folder / "slurm.conf").write_text(f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
CredType=cred/munge
SlurmctldPort={free_port()}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
TmpFS={folder}/spool/%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/ctld
SlurmdLogFile={folder}/log/slurmd-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
MpiDefault=none
SchedulerParameters={scheduler}
KillWait=5
MinJobAge={min_job_age_s}
DefMemPerCPU=100
SlurmdTimeout=30
GresTypes=gpu
{accounts}
{tokens}
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=few Nodes=n2,n3 MaxTime=INFINITE State=UP
""")
    lines = []
    for at, node in enumerate(NODES):
        for number in (2 * at, 2 * at + 1):
            os.mknod(folder / "dev" / f"gpu{number}", stat.S_IFCHR | 0o666, os.makedev(1, 3))  # as /dev/null is
        lines.append(f"NodeName={node} Name=gpu Type=h100 File={folder}/dev/gpu[{2 * at}-{2 * at + 1}]")
    (folder / "gres.conf").write_text("\n".join(lines) + "\n")


def _accounting_lines(folder: Path, port: int) -> str:
    """What slurm.conf says of the accounting; slurmdbd's own configuration is written."""
    host = socket.gethostname().partition(".")[0]
    configuration = folder / "slurmdbd.conf"
    configuration.write_text(f"""
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
LogFile={folder}/log/slurmdbd
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={free_port()}
StorageUser=slurm
StoragePass=slurm
StorageLoc=slurm_test
""")
    configuration.chmod(0o600)
    return f"""AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePass={folder}/munge/sock
AccountingStoragePort={port}
AccountingStorageEnforce=associations,qos
AccountingStorageTRES=gres/gpu"""


def _start_accounting(made: Slurm) -> None:
    folder = made.folder
    data, at = folder / "mariadb", folder / "mariadb.sock"
    lines = (folder / "slurmdbd.conf").read_text().splitlines()
    port = next(line.partition("=")[2] for line in lines if line.startswith("StoragePort="))
    made.run(
        _program("mariadb-install-db"), "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db",
        "--auth-root-authentication-method=normal",
    )  # fmt: skip
    with (folder / "log" / "mariadb").open("wb") as log:
        subprocess.Popen(
            [_program("mariadbd"), "--no-defaults", "--user=root", f"--datadir={data}", f"--socket={at}",
             f"--port={port}", "--bind-address=127.0.0.1", "--innodb-buffer-pool-size=32M",
             "--innodb-log-file-size=16M", f"--pid-file={folder}/mariadb.pid"],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    grant = "CREATE USER slurm@'127.0.0.1' IDENTIFIED BY 'slurm'; GRANT ALL ON *.* TO slurm@'127.0.0.1';"
    _until(lambda: made.run("mariadb", "--no-defaults", f"--socket={at}", "-e", grant), "MariaDB")
    made.run(_program("slurmdbd"), text=None)
    _until(lambda: made.run("sacctmgr", "-n", "list", "cluster"), "slurmdbd")


def _make_accounts(made: Slurm) -> None:
    _until(lambda: "test" in made.run("sacctmgr", "-n", "list", "cluster") or made.run("false"), "the cluster in it")
    for words in (("account", "ai"), ("qos", "fast"), ("user", "root", "account=ai", "qos=normal,fast")):
        made.run("sacctmgr", "-i", "add", *words)


def _answers(address: str) -> bool:
    """Whether somebody listens there."""
    kind, _, where = address.rpartition(":")
    with contextlib.suppress(OSError):
        with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as one:
            one.connect(where if kind == "unix" else (kind, int(where)))
        return True
    return False


def _until(act: Callable[[], str], what: str) -> None:
    """Until ``act`` does not fail any more."""
    until = time.monotonic() + 60
    while True:
        with contextlib.suppress(subprocess.CalledProcessError):
            act()
            return
        if time.monotonic() > until:
            raise RuntimeError(f"{what} does not answer")
        time.sleep(0.1)


def _end_all_of(folder: Path) -> None:
    for _ in range(3):
        found = []
        for process in psutil.process_iter(["cmdline", "name"]):
            with contextlib.suppress(psutil.Error):
                text = " ".join(process.info["cmdline"] or ())
                own = process.environ() if process.info["name"].startswith(("slurm", "munged", "srun")) else {}
                if process.pid != os.getpid() and (str(folder) in text or str(folder) in own.get("SLURM_CONF", "")):
                    process.kill()
                    found.append(process)
        if not found:
            return
        psutil.wait_procs(found, timeout=5)
