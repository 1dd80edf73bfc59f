"""``torch_sluice.plan`` and ``torch-sluice plan``: an answer that fits, explains itself and can be started."""

import json
import re
from dataclasses import asdict, replace

import pytest

import torch_sluice
from torch_sluice import cli
from torch_sluice.plan import Layout, ModelShape, load_cluster, predict, search

MODEL = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, 8192)


@pytest.fixture(scope="module")
def found():
    return torch_sluice.plan(MODEL, "h100-80g", gpus=64, global_batch=128)


def test_the_plan_fits_and_is_what_predict_says_of_its_layout(found):
    assert found.estimate.total_bytes <= found.cluster.memory_bytes
    assert predict(MODEL, found.cluster, found.layout) == found.estimate
    assert all(cost.step_s >= found.estimate.step_s for _, cost in found.others)
    layout = found.layout
    assert layout.dp * layout.tp * layout.pp * layout.cp == 64
    assert layout.tp <= 8
    assert layout.cp == 1


def test_the_plan_explains_itself(found):
    text = found.explain()
    assert f"of {found.cluster.memory_bytes / 1e9:.1f} GB: weights" in text
    assert "optimizer state" in text
    assert "activations" in text
    assert re.search(r"^tp \d+: the best with another, tp \d+, takes \+[\d.]+ % \(.+ s instead of .+ s\)$", text, re.M)
    assert re.search(r"^next: ", text, re.M)
    assert "torchrun --nnodes 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 --nproc-per-node 8 -m " in text
    assert f"train --mesh {found.mesh}" in text


def test_the_command_is_one_that_train_understands():
    plan = torch_sluice.plan(
        MODEL, "h100-80g", gpus=8, global_batch=16, space={"pp": (2, 2), "dp": (2, 2), "zero": (0, 1)}
    )
    assert plan.mesh == "dp=2,tp=2,pp=2"
    program = plan.command.split(" -m torch_sluice.cli ")
    assert program[0] == "torchrun --nproc-per-node 8"
    options = cli._parser().parse_args(program[1].split())
    assert options.mesh == plan.mesh
    assert options.schedule == plan.layout.schedule


def test_reasons_are_true(found):
    value = found.layout.tp
    reason = next(text for text in found.reasons if text.startswith(f"tp {value}: the best with another"))
    other = int(re.search(r"another, tp (\d+)", reason)[1])
    best = search(MODEL, found.cluster, Layout(64, 128), {"tp": (other, other)}, capacity=1).candidates[0][1]
    slower = float(re.search(r"takes \+([\d.]+) %", reason)[1])
    assert best.step_s / found.estimate.step_s - 1 == pytest.approx(slower / 100, abs=6e-4)


def test_a_model_that_fits_nowhere_is_told_what_would_do():
    big = replace(MODEL, layers=128, hidden=25600, heads=160, kv_heads=160, ffn=102400, head_dim=160)
    with pytest.raises(
        MemoryError, match=r"fits nowhere: of 8 GPUs with 85.9 GB each, the leanest layout .* needs [\d.]+ GB "
    ):
        torch_sluice.plan(big, gpus=8, global_batch=8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(gpus=0), "gpus is 0, expected 1 to 2"),
        (dict(gpus=7919), "gpus is 7919, expected a number that some dp, tp, pp and cp of the space cut for 32 heads"),
        (dict(space={"ep": (1, 2)}), "space has ep, expected dp, tp"),
        (dict(space={"tp": (3, 2)}), "space.tp is 3 to 2, expected a range"),
        (dict(layout={"tp": 2}), "layout has tp, expected an option that isn't searched"),
        (dict(layout={"precision": "int3"}), "precision is 'int3', expected one of bf16, fp8"),
        (dict(depth=3), "unknown depth, expected members of ModelShape"),
    ],
)
def test_nonsense_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        torch_sluice.plan(MODEL, **(dict(gpus=8, global_batch=16) | arguments))


def test_the_command_line(tmp_path, capsys):
    config = {
        "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 131072,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = tmp_path / "plans" / "plan.json"
    command = ["plan", "--model", str(tmp_path), "--sequence", "8192", "--gpus", "64", "--global-batch", "128"]
    assert cli.main([*command, "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    best = torch_sluice.plan(MODEL, gpus=64, global_batch=128)
    assert result["layout"] == asdict(best.layout)
    assert result["command"] == best.command
    assert best.explain() in capsys.readouterr().out
    assert cli.main([*command, "--tp", "2", "--pp", "1-2"]) == 0
    assert "tp 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "8"], "model lacks layers, expected one of layers"),
        (["--gpus", "8", "--model", "/no/such/config.json"], "/no/such/config.json"),
        (["--gpus", "8", "--cluster", "z9000"], "cluster is 'z9000', expected one of a100-80g"),
        (["--gpus", "8", "--tp", "x"], "--tp is 'x', expected a whole number, or two with a hyphen"),
    ],
)
def test_mistakes_on_the_command_line_end_in_one_line(options, message, capsys):
    assert cli.main(["plan", "--global-batch", "8", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_plain_numbers_alone_are_enough(capsys):
    sizes = {"layers": 12, "hidden": 768, "heads": 12, "ffn": 3072, "vocab": 50304, "sequence": 1024}
    numbers = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    assert cli.main(["plan", *numbers, "--gpus", "4", "--global-batch", "64", "--cluster", "a100-80g"]) == 0
    assert load_cluster("a100-80g").gpus_per_node == 8
    assert "start: torchrun --nproc-per-node 4" in capsys.readouterr().out
