"""``torch-sluice info``: facts that can be checked against what is there."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import torch_abi_audit

import torch_sluice
from torch_sluice import info


def test_info_as_json(run_command):
    process = run_command("info", "--json", env={**os.environ, "SLUICE_ISA": "scalar"})
    assert process.returncode == 0, process.stderr
    facts = json.loads(process.stdout)
    assert facts["torch"]["version"] == torch.__version__
    assert facts["python"] == platform.python_version()
    assert facts["cpu"]["isa"] == "scalar"
    assert "CPU" in facts["library"]["operators"]["sluice::gated_attention"]
    assert set(facts["kernels"]["gated_attention"]) == {"float32", "bfloat16", "float16", "float64"}
    assert not facts["kernels"]["gated_attention"]["float32"].startswith("avx")
    assert facts["library"]["version"] == torch_sluice.__version__
    newest_needed = torch_abi_audit.inspect_extension(Path(facts["library"]["path"])).torch.min_torch_version
    assert facts["library"]["abi"] == f"LibTorch stable ABI, target {newest_needed.removesuffix('.0')}"


def _facts(monkeypatch, packages=(), cuda_kernels=False, cuda_build=None):
    monkeypatch.setattr(info, "_version_of", lambda name: "1.0" if name in packages else None)
    devices = ["CPU", "CUDA"] if cuda_kernels else ["CPU"]
    monkeypatch.setattr(info, "_operators", lambda: {"sluice::gated_attention": devices})
    monkeypatch.setattr(torch.version, "cuda", cuda_build)
    return info.describe_plugin()


def test_every_missing_package_is_named_with_what_needs_it_and_how_to_get_it(monkeypatch):
    facts = _facts(monkeypatch)
    gaps = {gap["what"]: gap for gap in facts["missing"]}
    assert gaps.keys() >= {"transformers", "rich", "matplotlib", "jinja2", "accelerate", "tensorboard"}
    text = "\n".join(info.fact_lines(facts))
    for gap in gaps.values():
        assert f"  {gap['what']} (for {gap['needed_for']}): {gap['how']}" in text
    for name in facts["packages"]:
        assert gaps[name]["how"].startswith("pip install ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize(
    ("kernels", "build", "what"),
    [(False, None, "CUDA kernels"), (True, None, "a CUDA build of torch"), (True, "13.0", "a CUDA device")],
)
def test_what_is_missing_for_a_gpu(monkeypatch, kernels, build, what):
    facts = _facts(monkeypatch, list(info._OPTIONAL), kernels, build)
    assert [gap["what"] for gap in facts["missing"] if not gap["what"].startswith("a fast kernel")] == [what]


def test_packages_of_the_train_extra_are_looked_for(repository):
    (line,) = re.findall(r"^train = \[(.*)\]$", (repository / "pyproject.toml").read_text(), re.M)
    assert {re.match(r"[\w-]+", name.strip(' "'))[0] for name in line.split(",")} <= info._OPTIONAL.keys()


def test_installed_command(repository):
    """The script on the path of this Python; where the package is not installed, the entry point that it would get."""
    (entry,) = re.findall(r'^torch-sluice = "(.*)"$', (repository / "pyproject.toml").read_text(), re.M)
    module, function = entry.split(":")
    script = shutil.which("torch-sluice", path=sysconfig.get_path("scripts"))
    command = [script] if script else [sys.executable, "-c", f"import sys, {module} as m; sys.exit(m.{function}())"]
    process = subprocess.run([*command, "--version"], capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, torch_sluice.__version__ + "\n", "")


def test_info_for_people_says_of_an_untimed_kernel_that_it_is():
    facts = info.describe_plugin()
    for measured in (True, False):
        facts["measured"]["accumulate"]["every dtype"] = measured
        line = next(line for line in info.fact_lines(facts) if line.startswith("accumulate, every dtype"))
        assert ("not been measured" in line) != measured


def test_speed_is_measured_by_family_and_kernel():
    assert info.is_measured("gated_attention", "avx512bf16_bf16_12x32")
    assert not info.is_measured("gated_attention", "avx512_bf16_12x32")
    assert not info.is_measured("accumulate", "avx512")
    assert info.is_measured("accumulate", "scalar")


def test_info_for_people_names_a_bad_cap(run_command):
    process = run_command("info", env={**os.environ, "SLUICE_ISA": "sse9"})
    assert process.returncode == 0, process.stderr
    assert "SLUICE_ISA is 'sse9', expected one of" in process.stdout
    assert torch.__version__ in process.stdout
