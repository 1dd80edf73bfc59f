"""Random programs, each of which gives what it gives without Sluice. A failing one prints itself, and its seed.

``SLUICE_PROGRAM_SEED`` is the seed of the first program (else a fresh one), ``SLUICE_PROGRAMS`` how many there are.
"""

import contextlib
import os
import random

import pytest
import torch
from support import accumulate_programs, accumulate_windows

SEED = int(os.environ.get("SLUICE_PROGRAM_SEED") or random.SystemRandom().randrange(10**9))
COUNT = int(os.environ.get("SLUICE_PROGRAMS") or 200)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Nothing(contextlib.nullcontext):
    """A session that does nothing: what the two sides differ in is then the harness's fault."""

    def __init__(self, model, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def _parameters(self):
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def reset(self):
        for parameter in self._parameters():
            parameter.grad = None

    def state_dict(self):
        return {"grads": [None if p.grad is None else p.grad.detach() for p in self._parameters()]}

    def load_state_dict(self, state):
        for parameter, grad in zip(self._parameters(), state["grads"], strict=True):
            parameter.grad = grad


class Forgetful(Nothing):
    """Loses what came so far when a gradient comes: a fault that programs must find."""

    def __enter__(self):
        self.handles = [p.register_hook(lambda _, p=p: setattr(p, "grad", None)) for p in self._parameters()]

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def test_programs_tell_two_sides_apart_only_where_there_is_a_difference():
    finite = [seed for seed in range(30) if "infinite" not in str(accumulate_programs.make_program(seed, "fp32"))]
    for seed in finite:
        assert accumulate_programs.check_program(seed, "fp32", Nothing) is None
    found = [accumulate_programs.check_program(seed, "fp16", Forgetful) for seed in range(5)]
    assert any(found)
    assert max(len(text.splitlines()) for text in found if text) <= 8  # shrunk to what is needed


@pytest.mark.parametrize("policy", accumulate_programs.POLICIES)
def test_programs_that_decide_themselves_when_to_step(policy):
    failures = [accumulate_programs.check_program(SEED + i, policy) for i in range(COUNT // 3)]
    assert not any(failures), "\n\n".join([f"SLUICE_PROGRAM_SEED={SEED}", *filter(None, failures)][:4])


@pytest.mark.parametrize("policy", accumulate_programs.POLICIES)
def test_programs_that_step_after_each_micro_batch(policy):
    failures = [accumulate_windows.check_program(SEED + i, policy) for i in range(COUNT // 3)]
    assert not any(failures), "\n\n".join([f"SLUICE_PROGRAM_SEED={SEED}", *filter(None, failures)][:4])
