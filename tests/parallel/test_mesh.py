"""The main job on a mesh of ranks: each way to spread it trains as one rank does, step by step.

What is random in it depends on step, micro-batch and layer alone, so nothing has to be switched off but the rounding:
sums of gradients stay in float32 here, because blocks of float16 fall otherwise in parts of a tensor. Everything is
computed in float64 (norms and rotations in float32, as the model has them), so that a wrong sum cannot hide behind
rounding errors that grow with the steps.
"""

import pytest
from support.mesh import DEEP, FEW, SETTINGS, WIDE, train_on_mesh, train_one_rank, write_text

from torch_sluice.train.mesh.layout import SCHEDULES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def one_rank(folder):
    """Losses and densities of one rank, for some settings, of the dense side or of Sluice's."""
    known = {}

    def get(settings, dense):
        if (settings, dense) not in known:
            known[settings, dense] = train_one_rank(folder, settings, dense)
        return known[settings, dense]

    return get


def run_on_mesh(*arguments):
    return train_on_mesh(*arguments)


def check(ranks, folder, one_rank, settings, **options):
    size = options.get("dp", 1) * options.get("tp", 1) * options.get("pp", 1)
    losses, densities = one_rank(settings, options.get("dense", False))
    results = ranks(size).run(run_on_mesh, folder, settings, options, seconds=200)
    assert all(result == results[0] for result in results)
    assert results[0][0] == pytest.approx(losses, rel=1e-6)
    assert results[0][1] == pytest.approx(densities, abs=1e-9)
    if settings.steps == SETTINGS.steps:
        assert losses[-1] < losses[0] - 0.2
        assert densities[-1] < 0.9  # the gates have begun to close, or it was not them that were compared


# Every split of 2 and 4 ranks, every schedule, and three dimensions at once.
LAYOUTS = [
    *(dict(dp=2), dict(pp=2, schedule="gpipe"), dict(pp=2, schedule="1f1b"), dict(dp=4), dict(dp=2, pp=2)),
    dict(dp=2, tp=2, pp=2),
]
TENSOR_PARALLEL = [dict(tp=2), dict(tp=4), dict(dp=2, tp=2), dict(tp=2, pp=2), dict(dp=2, tp=2, data_parallel="fsdp")]
OF_FOUR_STAGES = [*(dict(pp=2, schedule=schedule) for schedule in SCHEDULES[2:]), dict(pp=4)]
FULLY_SHARDED = [dict(dp=2), dict(dp=2, pp=2)]
FOR_SOME_STEPS = [
    *(dict(dp=4, tp=2), dict(dp=4, pp=2), dict(tp=2, pp=4)),
    *(dict(dp=2, tp=2, pp=2, dense=True), dict(dp=2, tp=2, pp=2, data_parallel="fsdp")),
    *(dict(dp=2, pp=2, schedule=schedule) for schedule in SCHEDULES[2:]),
    dict(dp=4, data_parallel="fsdp"),
]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_losses_are_those_of_one_rank(ranks, folder, one_rank, options):
    check(ranks, folder, one_rank, SETTINGS, **options)


@pytest.mark.parametrize("options", TENSOR_PARALLEL, ids=str)
def test_losses_are_those_of_one_rank_when_tensor_parallel(ranks, folder, one_rank, options):
    check(ranks, folder, one_rank, FEW, **options)


@pytest.mark.parametrize("options", OF_FOUR_STAGES, ids=str)
def test_losses_are_those_of_one_rank_with_four_stages(ranks, folder, one_rank, options):
    check(ranks, folder, one_rank, DEEP, **options)


@pytest.mark.parametrize("options", FULLY_SHARDED, ids=str)
def test_losses_are_those_of_one_rank_when_fully_sharded(ranks, folder, one_rank, options):
    check(ranks, folder, one_rank, SETTINGS, data_parallel="fsdp", **options)


@pytest.mark.parametrize("options", FOR_SOME_STEPS, ids=str)
def test_losses_are_those_of_one_rank_for_some_steps(ranks, folder, one_rank, options):
    check(ranks, folder, one_rank, WIDE, **options)
