"""The main job on a mesh of ranks: each way to spread it trains as one rank does, step by step.

What is random in it depends on step, micro-batch and layer alone, so nothing has to be switched off but the rounding:
sums of gradients stay in float32 here, because blocks of float16 fall otherwise in parts of a tensor. Everything is
computed in float64 (norms and rotations in float32, as the model has them), so that a wrong sum cannot hide behind
rounding errors that grow with the steps.
"""

import dataclasses

import pytest
import torch

from torch_sluice.accumulate.policy import make_policy
from torch_sluice.train.data import load_corpus
from torch_sluice.train.settings import PRESETS
from torch_sluice.train.side import Side
from torch_sluice.train.sluice import SluiceSide

SETTINGS = dataclasses.replace(
    PRESETS["demo"], steps=50, context=40, micro_batches=4, micro_size=1, layers=2, width=16, heads=2, feedforward=24,
    local_window=4, target_density=0.4, warmup=5, gate_learning_rate=0.1,
)  # fmt: skip
DEEP = dataclasses.replace(SETTINGS, layers=4, steps=8)  # for two stages a rank
SHORT = dataclasses.replace(SETTINGS, steps=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(10):
        lines = (f"def function_{number}_{i}(x):\n    return x + {i}\n" for i in range(30))
        (folder / f"module_{number}.py").write_text("".join(lines))
    return str(folder)


@pytest.fixture(scope="module")
def one_rank(folder):
    """Losses and densities of the main job's own side, which knows nothing of meshes, for some settings."""
    known = {}

    def get(settings, dense):
        if (settings, dense) not in known:
            before = torch.get_default_dtype(), torch.get_num_threads()
            torch.set_default_dtype(torch.float64)
            torch.set_num_threads(1)
            try:
                known[settings, dense] = _train_one_rank(settings, dense, load_corpus(folder, settings.context))
            finally:
                torch.set_default_dtype(before[0])
                torch.set_num_threads(before[1])
        return known[settings, dense]

    return get


def _train_one_rank(settings, dense, corpus):
    from torch_sluice.train.mesh.stage import Position

    side = (Side if dense else SluiceSide)(settings)
    if not dense:
        side.session.policy = make_policy("fp32", 0.0, settings.micro_batches)
    position, micro = Position(settings.seed), iter(())
    side.model.register_forward_pre_hook(lambda *_: numbers.append(next(micro)))
    numbers = []
    for index, layer in enumerate(side.model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: position.reseed(numbers[-1], index))
    for step in range(settings.steps):
        position.step, micro = step, iter(range(settings.micro_batches))
        batches = [
            corpus.batch(settings.seed, step, m, settings.micro_size, settings.context)
            for m in range(settings.micro_batches)
        ]
        side.train_step(batches, step)
    side.close()
    return side.history.loss, side.history.density


def on_mesh(folder, settings, **options):
    from torch_sluice.train.mesh.layout import Layout, check_fit
    from torch_sluice.train.mesh.side import MeshSide

    layout = Layout(**options)
    check_fit(settings, layout)
    torch.set_default_dtype(torch.float64)
    try:
        side, losses, densities = MeshSide(settings, layout, policy="fp32"), [], []
        corpus, first = load_corpus(folder, settings.context), side.position.first_micro
        for step in range(settings.steps):
            batches = [
                corpus.batch(settings.seed, step, first + m, settings.micro_size, settings.context)
                for m in range(side.micro_batches)
            ]
            losses.append(side.train_step(batches, step)[0])
            densities.append(side.density)
        side.close()
        return losses, densities
    finally:
        torch.set_default_dtype(torch.float32)


def run_on_mesh(folder, settings, options):
    return on_mesh(folder, settings, **options)


def check(ranks, folder, one_rank, settings, **options):
    size = options.get("dp", 1) * options.get("tp", 1) * options.get("pp", 1)
    losses, densities = one_rank(settings, options.get("dense", False))
    results = ranks(size).run(run_on_mesh, folder, settings, options, seconds=200)
    assert all(result == results[0] for result in results)
    assert results[0][0] == pytest.approx(losses, rel=1e-6)
    assert results[0][1] == pytest.approx(densities, abs=1e-9)
    assert losses[-1] < losses[0] - 0.2
    if settings is SETTINGS and not options.get("dense"):
        assert densities[-1] < 0.9  # the gates have begun to close, or it was not them that were compared


@pytest.mark.parametrize(
    "options",
    [
        dict(dp=2),
        dict(tp=2),
        dict(pp=2, schedule="1f1b"),
        dict(pp=2, schedule="gpipe"),
        dict(dp=2, tp=2, pp=2),
    ],
    ids=str,
)
def test_losses_are_those_of_one_rank(ranks, folder, one_rank, options):
    check(ranks, folder, one_rank, SETTINGS, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(dp=2, tp=2, dense=True),
        dict(dp=2, data_parallel="fsdp"),
        dict(dp=2, tp=2, data_parallel="fsdp"),
        dict(dp=2, pp=2, data_parallel="fsdp"),
    ],
    ids=str,
)
def test_losses_are_those_of_one_rank_for_some_steps(ranks, folder, one_rank, options):
    check(ranks, folder, one_rank, SHORT, **options)


@pytest.mark.parametrize(
    "options",
    [
        dict(pp=2, schedule="interleaved"),
        dict(pp=2, schedule="interleaved-zero-bubble"),
        dict(pp=2, schedule="zero-bubble"),
    ],
    ids=str,
)
def test_schedules_with_two_stages_a_rank(ranks, folder, one_rank, options):
    check(ranks, folder, one_rank, DEEP, **options)
