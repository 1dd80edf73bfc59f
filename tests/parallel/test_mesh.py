"""The main job on a mesh of ranks: each way to spread it trains as one rank does, step by step.

What is random in it depends on step, micro-batch and layer alone, so nothing has to be switched off but the rounding:
sums of gradients stay in float32 here, because blocks of float16 fall otherwise in parts of a tensor. Everything is
computed in float64 (norms and rotations in float32, as the model has them), so that a wrong sum cannot hide behind
rounding errors that grow with the steps.
"""

import pytest
from support.mesh import DEEP, SETTINGS, SHORT, train_on_mesh, train_one_rank, write_text


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
