"""How torch finds the backend, and how the library for the torch at hand is found or made."""

import json
import os
import shutil
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import torch_sluice
from torch_sluice.parallel import build

NAMES = "import torch.distributed as d; print(d.Backend.backend_list, d.Backend.default_device_backend_map)"


def run(code, **environment):
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


@pytest.fixture
def entry_points(tmp_path, repository):
    """What an installed package tells torch, for a package that may not be installed."""
    text = (repository / "pyproject.toml").read_text()
    groups = [group for group in ("torch.backends", "torch.distributed.backends") if f'entry-points."{group}"' in text]
    assert len(groups) == 2
    metadata = tmp_path / "sluice_registration-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: sluice-registration\nVersion: 1\n")
    lines = [f"[{group}]\nsluice = torch_sluice_backend:register\n" for group in groups]
    (metadata / "entry_points.txt").write_text("\n".join(lines))
    package = Path(torch_sluice.__file__).parents[1]
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(package), os.environ.get("PYTHONPATH", "")])}


def test_torch_finds_the_backend_by_itself_and_keeps_its_defaults(entry_points):
    found = run(f"{NAMES}; import sys; print('torch_sluice' in sys.modules)", **entry_points)
    assert "'sluice'" in found
    assert "'cpu': 'sluice'" not in found
    assert "'cuda': 'sluice'" not in found
    assert found.splitlines()[-1] == "False"


def test_without_autoload_the_package_registers_it(entry_points):
    off = {**entry_points, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    assert "'sluice'" in run(f"import torch_sluice; {NAMES}", **off)
    if not hasattr(torch.distributed.Backend, "_ensure_backend_registered"):
        assert "'sluice'" not in run(NAMES, **off)


def test_the_name_alone_makes_a_group(entry_points, tmp_path):
    code = f"""
import torch, torch.distributed as dist
dist.init_process_group("sluice", store=dist.FileStore({str(tmp_path / "store")!r}, 1), rank=0, world_size=1)
tensor = torch.ones(2)
dist.all_reduce(tensor)
print(tensor.tolist(), dist.group.WORLD._get_backend(torch.device("cpu")).name())
dist.destroy_process_group()
dist.init_process_group("cpu:sluice,cuda:sluice", store=dist.HashStore(), rank=0, world_size=1)
dist.barrier()
dist.destroy_process_group()
"""
    assert run(code, **entry_points) == "[1.0, 1.0] sluice\n"


def test_cuda_tensors_need_nccl(ranks):
    if torch.distributed.is_nccl_available():
        pytest.skip("this build of torch has NCCL")
    ranks(1).run(ask_for_nccl)


def ask_for_nccl():
    options = torch.distributed.BarrierOptions()
    options.device = torch.device("cuda")
    backend = torch.distributed.group.WORLD._get_backend(torch.device("cpu"))
    with pytest.raises(torch.distributed.DistBackendError, match="has no NCCL, which CUDA tensors need"):
        backend.barrier(options)


def stand_in_for_nccl():
    """Gloo under NCCL's name: what a call for a CUDA device reaches, without one."""
    distributed, made = torch.distributed, []

    def create(options, backend_options):
        made.append((options.group_rank, options.group_size, options.timeout))
        gloo = distributed.ProcessGroupGloo
        return gloo(options.store, options.group_rank, options.group_size, timeout=options.timeout)

    before = distributed.Backend._plugins.get("NCCL")
    distributed.Backend._plugins["NCCL"] = distributed.Backend._BackendPlugin(create, True)
    try:
        group = distributed.new_group(timeout=timedelta(seconds=17))
        backend = group._get_backend(torch.device("cuda"))
        assert backend.name() == "sluice"
        options = distributed.BarrierOptions()
        backend.barrier(options).wait()
        assert made == []
        options.device = torch.device("cuda", 0)
        for _ in range(3):
            backend.barrier(options).wait()
        assert made == [(distributed.get_rank(), 2, timedelta(seconds=17))]
        distributed.destroy_process_group(group)
    finally:
        del distributed.Backend._plugins["NCCL"]
        if before is not None:
            distributed.Backend._plugins["NCCL"] = before


def test_calls_for_a_cuda_device_go_to_nccl_which_is_made_when_it_is_needed(ranks):
    ranks(2).run(stand_in_for_nccl)


@pytest.fixture
def other_torch(tmp_path, monkeypatch):
    """An installation whose library was built for another torch. The compiler is one that copies the library."""
    library = Path(torch_sluice.library_path())
    installed = tmp_path / "lib"
    installed.mkdir()
    for name in ("libsluice_torch.so", "libsluice_c10d.so"):
        shutil.copy(library.with_name(name), installed)
    (installed / "libsluice_c10d.json").write_text(json.dumps({"torch": "2.12.9"}))
    compiler = tmp_path / "compiler"
    compiler.write_text(
        f"#!/bin/sh\necho run >> {tmp_path}/calls\nsleep .2\n"
        f'while [ "$1" != -o ]; do shift; done\ncp {installed}/libsluice_c10d.so "$2"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("SLUICE_LIBRARY", str(installed / "libsluice_torch.so"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    return tmp_path


def test_the_installed_library_serves_the_torch_it_was_built_for(other_torch):
    (other_torch / "lib/libsluice_c10d.json").write_text(json.dumps({"torch": build.torch_release()}))
    assert build.library() == other_torch / "lib/libsluice_c10d.so"


def test_for_another_torch_it_is_compiled_once(other_torch, capfd):
    found = []
    threads = [threading.Thread(target=lambda: found.append(build.library())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1
    assert found[0].read_bytes() == (other_torch / "lib/libsluice_c10d.so").read_bytes()
    assert (other_torch / "calls").read_text() == "run\n"
    assert f"compiling the process-group backend for torch {build.torch_release()}" in capfd.readouterr().err
    assert (other_torch / "cache/torch_sluice").stat().st_mode & 0o777 == 0o700
    assert build.library() == found[0]


def test_a_compiler_that_fails_is_reported(other_torch, monkeypatch):
    (other_torch / "compiler").write_text("#!/bin/sh\necho 'x.cpp:1: error: it is broken' >&2\nexit 1\n")
    with pytest.raises(ImportError, match=r"was built for torch 2.12.9, this is torch .*error: it is broken"):
        build.library()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(other_torch))
    with pytest.raises(ImportError, match=r"there is no C\+\+ compiler to build it with"):
        build.library()


def test_a_cache_that_others_may_write_is_refused(other_torch):
    (other_torch / "cache/torch_sluice").mkdir(parents=True)
    (other_torch / "cache/torch_sluice").chmod(0o777)
    with pytest.raises(ImportError, match="can be written by others"):
        build.library()
