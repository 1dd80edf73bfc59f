"""``torch-sluice info``: facts that can be checked against what is there."""

import json
import os
import platform

import torch

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
    for gap in facts["missing"]:
        assert all(gap[key] for key in ("what", "needed_for", "how"))


def test_info_for_people_says_of_an_untimed_tier_that_it_is():
    facts = info.describe_plugin()
    for measured in (True, False):
        facts["cpu"]["isa_measured"] = measured
        tier = next(line for line in info.fact_lines(facts) if line.startswith("kernel tier"))
        assert ("not been measured" in tier) != measured


def test_info_for_people_names_a_bad_cap(run_command):
    process = run_command("info", env={**os.environ, "SLUICE_ISA": "sse9"})
    assert process.returncode == 0, process.stderr
    assert "SLUICE_ISA is 'sse9', expected one of" in process.stdout
    assert torch.__version__ in process.stdout
