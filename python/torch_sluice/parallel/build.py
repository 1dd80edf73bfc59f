"""Finds libsluice_c10d.so for the torch that is installed, or compiles it.

A process group is a C++ object of torch, whose interface changes with every release, unlike that of the operators. The
library that came with this package was built for one release of torch. For another, its few sources, which came along
too, are compiled once for each user, into a cache folder.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from torch_sluice import _library

_NAME = "libsluice_c10d.so"
_HERE = Path(__file__).parent


def torch_release() -> str:
    """``"2.13.0"`` for ``"2.13.0+cpu"``: CPU and CUDA builds of a release have the same C++ interface."""
    return torch.__version__.split("+")[0]


def library() -> Path:
    """Path of the library for this torch. Raises ``ImportError`` where there is none and none can be made."""
    installed = Path(_library.library_path()).with_name(_NAME)
    built_for = _built_for(installed)
    if built_for == torch_release():
        return installed
    return _compiled(built_for)


def _built_for(path: Path) -> str | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        if path.is_file():
            return json.loads(path.with_suffix(".json").read_text())["torch"]
    return None


def _refuse(built_for: str | None, problem: str):
    origin = f"was built for torch {built_for}" if built_for else "came without its compiled part"
    raise ImportError(
        f"The process-group backend of torch_sluice {origin}, this is torch {torch_release()}, and {problem}. Install "
        "a C++ compiler (or name one in CXX) and try again, or install the package anew under this torch: "
        "pip install --no-build-isolation --no-deps --force-reinstall torch-sluice"
    )


def _source_folders() -> list[Path]:
    """Folders to include from: those of the installed package, or of the source tree."""
    repository = _HERE.parents[2]
    for folders in ([_HERE / "sources"], [repository / "torch_bindings", repository / "ops"]):
        if (folders[0] / "c10d/backend.cpp").is_file():
            return folders
    return []


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "torch_sluice"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if folder.stat().st_uid != os.geteuid() or folder.stat().st_mode & 0o022:
        raise OSError(
            f"the cache folder {folder} can be written by others than its user; set XDG_CACHE_HOME to another"
        )
    return folder


def _compiled(built_for: str | None) -> Path:
    folders = _source_folders()
    if not folders:
        _refuse(built_for, "the package holds no sources to compile it from")
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in {".cpp", ".h"})
    files = [path for path in files if path.parent.name in {"c10d", "sluice"}]
    digest = hashlib.sha256("".join([torch.__version__, *(path.read_text() for path in files)]).encode())
    key = f"c10d-torch{torch_release()}-{platform.machine()}-{digest.hexdigest()[:16]}"
    try:
        cache = _cache_folder()
        # Beside the lock that the ranks of a job wait at while the first of them compiles.
        with open(cache / f"{key}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            result = cache / f"{key}.so"
            if not result.is_file():
                _compile(built_for, folders, [path for path in files if path.suffix == ".cpp"], result)
            return result
    except OSError as problem:
        _refuse(built_for, f"compiling it for this torch failed: {problem}")


def _compile(built_for, folders, sources, result: Path) -> None:
    names = [os.environ.get("CXX"), "c++", "g++", "clang++"]
    compiler = next((name for name in names if name and shutil.which(name)), None)
    if compiler is None:
        _refuse(built_for, "there is no C++ compiler to build it with (c++, g++, clang++)")
    print(
        f"torch_sluice: compiling the process-group backend for torch {torch_release()}, once for this user",
        file=sys.stderr,
        flush=True,
    )
    installed = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory(dir=result.parent) as folder:
        # One file that includes them all: torch's headers take far longer than they do.
        together, output = Path(folder) / "all.cpp", Path(folder) / _NAME
        together.write_text("".join(f'#include "{path}"\n' for path in sources))
        command = [
            *(compiler, "-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", str(together)),
            *(f"-I{folder}" for folder in folders),
            *("-isystem", str(installed / "include"), "-isystem", str(installed / "include/torch/csrc/api/include")),
            f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
            *(str(installed / "lib" / name) for name in ("libtorch_cpu.so", "libc10.so")),
            *(_library.library_path(), "-Wl,-z,defs", "-o", str(output)),
        ]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode:
            errors = [line for line in process.stderr.splitlines() if "error" in line or "undefined" in line]
            _refuse(built_for, f"{compiler} failed to compile it: {' '.join(errors[:3]) or process.stderr[-500:]}")
        output.replace(result)
