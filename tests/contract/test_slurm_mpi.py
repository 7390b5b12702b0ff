"""MPI inside a gang on Slurm: what ``mpirun`` and ``srun`` start meets across the nodes, and adds its ranks up."""

from __future__ import annotations

import ctypes.util
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.test_engine_slurm import Centre, own_centre
from tests.slurm import why_not
from tidemill.model.ids import LaunchId, NodeId
from tidemill.model.plan import GangPlace

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
]
has_mpich = pytest.mark.skipif(
    not shutil.which("mpirun.mpich") or not ctypes.util.find_library("mpich"), reason="not installed: Debian's mpich"
)
has_pmix = pytest.mark.skipif(
    not list(Path("/usr/lib").glob("*/libpmix.so")), reason="not installed: Debian's libpmix-dev, which Slurm looks for"
)
has_open_mpi = pytest.mark.skipif(not shutil.which("mpirun.openmpi"), reason="not installed: Debian's openmpi-bin")
MPICH = """
import ctypes, os
mpi = ctypes.CDLL("libmpich.so.12")
world, integer, add = 0x44000000, 0x4C000405, 0x58000003  # as MPICH's mpi.h has them
"""
OPEN_MPI = """
import ctypes, os
mpi = ctypes.CDLL("libmpi.so.40", mode=ctypes.RTLD_GLOBAL)
names = ("ompi_mpi_comm_world", "ompi_mpi_int", "ompi_mpi_op_sum")  # as Open MPI's mpi.h has them
world, integer, add = (ctypes.c_void_p(ctypes.addressof(ctypes.c_char.in_dll(mpi, name))) for name in names)
"""
PROGRAM = """
mpi.MPI_Init(None, None)
rank, size, total = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
mpi.MPI_Comm_rank(world, ctypes.byref(rank))
mpi.MPI_Comm_size(world, ctypes.byref(size))
one = ctypes.c_int(rank.value + 1)
mpi.MPI_Allreduce(ctypes.byref(one), ctypes.byref(total), 1, integer, add, world)
with open(f"/proc/{os.getppid()}/environ") as starter:  # mpirun's proxy gives its processes the variables of rank 0
    words = [word for word in starter.read().split("\\0") if word.startswith("SLURMD_NODENAME=")]
node = words[0].partition("=")[2] if words else os.environ["SLURMD_NODENAME"]
os.write(1, f"mpi {rank.value} of {size.value} sums {total.value} on {node}\\n".encode())
mpi.MPI_Finalize()
"""


OPEN_RUN = "mpirun.openmpi --allow-run-as-root -n 2 --map-by ppr:1:node"


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Centre]:
    with own_centre(tmp_path_factory.mktemp("mpi")) as made:
        yield made


@pytest.mark.parametrize(
    ("starter", "library"),
    [
        pytest.param("mpirun.mpich -n 2 -ppn 1", MPICH, marks=has_mpich, id="mpirun of MPICH"),
        pytest.param("srun --mpi=pmi2 -N 2 -n 2", MPICH, marks=has_mpich, id="srun of MPICH"),
        pytest.param(OPEN_RUN, OPEN_MPI, marks=has_open_mpi, id="mpirun of Open MPI"),
        pytest.param("srun --mpi=pmix -N 2 -n 2", OPEN_MPI, marks=[has_open_mpi, has_pmix], id="srun of Open MPI"),
    ],
)
def test_processes_of_mpi_meet_across_the_nodes_of_a_gang(
    starter: str, library: str, centre: Centre, tmp_path: Path
) -> None:
    program = tmp_path / "program.py"
    program.write_text(library + PROGRAM)
    program.chmod(0o644)
    engine, bench = centre.engine(), centre.bench
    number = next(centre.numbers)
    places = tuple(
        GangPlace(node_id=NodeId(f"node_centre_n{at}"), cpu_milli=1_000, gpu_milli=0, memory_bytes=0) for at in (1, 2)
    )
    script = f"[ $TIDEMILL_RANK = 0 ] || exit 0; {starter} {sys.executable} {program}"
    specs = [
        bench.spec(
            script, launch_id=LaunchId(f"run_mpi{number}-0-1-{rank}"), rank=rank, world_size=2, gang=places,
            environment_variables=(("TIDEMILL_RANK", str(rank)),),
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for spec in specs:
        engine.launch(spec)
    centre.control.wait_for_event(specs[0].launch_id, "exited")
    log = bytes(centre.control.record(specs[0].launch_id).log).decode()
    said = sorted(line for line in log.splitlines() if line.startswith("mpi"))
    assert [line.rpartition(" on ")[0] for line in said] == ["mpi 0 of 2 sums 3", "mpi 1 of 2 sums 3"], log
    assert len({line.rpartition(" ")[2] for line in said}) == 2, "on two nodes"
