"""MPICH and Open MPI for the benchmark of collectives: their wheels, each in a folder of its own, and how ranks start.

Both wheels bring a libmpi, and mpi4py takes whichever it finds first, so the two never share a folder or a process.
"""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "build" / "peers"
MPI = ("mpich", "openmpi")


class PeerMissing(Exception):
    """A peer that can't be had, and why."""


def _site_packages(prefix: Path) -> Path:
    return prefix / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"


def install_mpi(name: str, folder: Path = FOLDER) -> Path:
    """Where this MPI and an mpi4py for it are, after installing them there if they aren't. Raises PeerMissing."""
    prefix = folder / name
    if (prefix / "bin" / "mpiexec").exists() and (_site_packages(prefix) / "mpi4py").is_dir():
        return prefix
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed"]
    result = subprocess.run([*command, "--prefix", prefix, "mpi4py", name], capture_output=True, text=True)
    if result.returncode or not (prefix / "bin" / "mpiexec").exists():
        lines = (result.stderr or result.stdout or "pip said nothing").strip().splitlines()
        raise PeerMissing(
            f"{name} is not measured: 'pip install --prefix {prefix} mpi4py {name}' failed: {lines[-1]}\n"
            f"Install these two wheels there by hand, or leave {name} out of --peers."
        )
    return prefix


def version_of(name: str, folder: Path = FOLDER) -> str:
    """Of the installed wheel."""
    found = importlib.metadata.distributions(name=name, path=[str(_site_packages(folder / name))])
    return next(iter(found)).version


def mpi_command(name: str, prefix: Path, ranks: int) -> list[str]:
    """What starts this many ranks on this machine, bound to no processor: the ranks pin themselves, alike for all."""
    mpiexec = [str(prefix / "bin" / "mpiexec"), "-n", str(ranks)]
    if name == "mpich":
        return [*mpiexec, "-launcher", "fork", "-bind-to", "none"]
    return [*mpiexec, "--oversubscribe", "--bind-to", "none"]


def mpi_environment(name: str, prefix: Path) -> dict[str, str]:
    """The environment of that command and of its ranks."""
    environment = dict(os.environ)
    _put_first(environment, "PYTHONPATH", _site_packages(prefix))
    _put_first(environment, "LD_LIBRARY_PATH", prefix / "lib")
    if name == "openmpi":
        environment |= {variable: str(prefix) for variable in ("OPAL_PREFIX", "PRTE_PREFIX", "PMIX_PREFIX")}
        environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return environment


def _put_first(environment: dict[str, str], variable: str, path: Path) -> None:
    environment[variable] = os.pathsep.join(filter(None, [str(path), environment.get(variable)]))
