"""Accumulation under the real Trainers, in one process and over ranks: the weights are those of training without."""

import os

import pytest
from support import accumulate_trainers
from support.accumulate_training import assert_close, assert_same
from support.rank_pool import Pools

pytest.importorskip("transformers")
pytest.importorskip("lightning")
pytest.importorskip("accelerate")


def check(found, wanted, policy):
    if policy == "fp32":
        assert_same(found, wanted)
    else:
        assert_close(found, wanted, 5e-3)


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Its settings are those of the first in a process, and are kept."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


TRAINERS = {
    "transformers": (accumulate_trainers.with_transformers, {}),
    "lightning": (accumulate_trainers.with_lightning, {}),
    "fabric": (accumulate_trainers.with_fabric, {}),
    "accelerate": (accumulate_trainers.with_accelerate, {"accumulate": False}),
    "accelerate's accumulate": (accumulate_trainers.with_accelerate, {}),
}


@pytest.mark.parametrize("policy", ["fp32", "fp16", "auto"])
@pytest.mark.parametrize("trainer", TRAINERS)
def test_a_trainer_with_a_session_trains_as_without(trainer, policy, tmp_path):
    train, options = TRAINERS[trainer]
    check(*(train(one, tmp_path, **options) for one in (policy, None)), policy)


def test_accelerates_prepared_optimizer_stepped_after_each_micro_batch(tmp_path):
    options = dict(accumulate=False, every=accumulate_trainers.EVERY)
    found, wanted = (accumulate_trainers.with_accelerate(one, tmp_path, **options) for one in ("fp32", None))
    assert_close(found, wanted, 1e-4)


@pytest.fixture(scope="module")
def ranks():
    pools = Pools(backend="gloo", timeout=120)
    yield pools
    pools.close()


def launched(trainer, strategy):
    """How the libraries are told, in the environment and by arguments, that this is a rank."""
    os.environ.update(
        LOCAL_RANK=os.environ["RANK"], LOCAL_WORLD_SIZE="2", GROUP_RANK="0", MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29571", TORCHELASTIC_RUN_ID="none",
    )  # fmt: skip
    if trainer in ("lightning", "fabric"):
        from lightning.fabric.plugins.environments import TorchElasticEnvironment
        from lightning.fabric.strategies import ModelParallelStrategy

        if strategy == "fsdp":
            strategy = ModelParallelStrategy(
                accumulate_trainers.shard, data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo"
            )
        return {"strategy": strategy, "plugins": [TorchElasticEnvironment()]}
    return {}


def train_on_a_rank(trainer, strategy, policy, folder):
    """Both sides on this rank."""
    from accelerate.state import AcceleratorState, GradientState

    train, options = TRAINERS[trainer]
    try:
        found, wanted = (
            train(one, folder, ranks=2, **options, **launched(trainer, strategy)) for one in (policy, None)
        )
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    check(found, wanted, policy)
    return [weight.sum().item() for weight in wanted]


CASES = [*((trainer, "ddp") for trainer in TRAINERS), ("fabric", "fsdp")]  # the others shard on GPUs only


@pytest.mark.parametrize("policy", ["fp32", "fp16"])
@pytest.mark.parametrize(("trainer", "strategy"), CASES)
def test_a_trainer_over_ranks_with_a_session_trains_as_without(ranks, trainer, strategy, policy, tmp_path):
    first, second = ranks(2).run(train_on_a_rank, trainer, strategy, policy, str(tmp_path), seconds=120)
    assert first == second
