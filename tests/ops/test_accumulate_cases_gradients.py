"""What people do to ``.grad``, and who looks at it from where, each with a session and in the same lines without."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from support.accumulate_training import assert_equal, assert_same, batches, both, loss_of, net, sgd
from torch.nn.utils import clip_grad_norm_

import torch_sluice

POLICIES = ["fp32", "fp16", "auto"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("how", ["numpy", "data", "storage", "out"])
def test_what_is_written_to_a_gradient_between_two_passes_counts(policy, how):
    """Collectives, numpy and ``.data`` write without a trace in the tensor's version."""

    def loop(model, optimizer, session):
        data = batches(4)
        for batch in data[:3]:
            loss_of(model, batch).backward()
        for parameter in model.parameters():
            if how == "numpy":
                array = parameter.grad.numpy()
                array *= 0.5
            elif how == "data":
                parameter.grad.data.clamp_(-0.01, 0.01)
            elif how == "storage":
                torch.from_numpy(parameter.grad.numpy()).fill_(0.25)
            else:
                torch.mul(parameter.grad, 0.5, out=parameter.grad)
        loss_of(model, data[3]).backward()
        optimizer.step()
        optimizer.zero_grad()

    assert_equal(*both(loop, policy), policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_hooks_of_the_user_see_the_sum_so_far(policy):
    def loop(model, optimizer, session):
        seen = []
        handle = model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        for batch in batches(3):
            loss_of(model, batch).backward()
        handle.remove()
        optimizer.step()
        return seen

    assert_equal(*both(loop, policy), policy)


def test_hooks_registered_before_the_session_see_it_too():
    model, seen = net(), []
    model[0].weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    data = batches(3)
    with torch_sluice.accumulate(model, sgd(model), policy="fp32"):
        for batch in data:
            loss_of(model, batch).backward()
    plain = net()
    for batch, found in zip(data, seen, strict=True):
        loss_of(plain, batch).backward()
        assert_same([found], [plain[0].weight.grad])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
def test_gradients_that_were_looked_at_in_a_mode_of_torch_go_on(policy, mode):
    def loop(model, optimizer, session):
        norms = []
        for i, batch in enumerate(batches(8)):
            loss_of(model, batch).backward()
            with mode():
                norms += [parameter.grad for parameter in model.parameters()]
            norms = [one.detach().clone() for one in norms]
            if i % 4 == 3:
                clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
        return norms

    assert_equal(*both(loop, policy), policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_backward_passes_from_several_threads(policy):
    def loop(model, optimizer, session):
        for batch in batches(6):
            thread = threading.Thread(target=lambda batch=batch: loss_of(model, batch).backward())
            thread.start()
            thread.join()
        optimizer.step()

    assert_equal(*both(loop, policy), policy)


AT_ONCE = """
import threading, torch, torch_sluice
from support.accumulate_training import assert_close, batches, gradients, loss_of, net

model, plain, data = net(), net(), batches(8)
with torch_sluice.accumulate(model, torch.optim.SGD(model.parameters(), 0.1), policy="fp32"):
    for _ in range(20):
        losses, start = [loss_of(model, batch) for batch in data], threading.Barrier(8)

        def run(loss):
            start.wait()
            loss.backward()

        threads = [threading.Thread(target=run, args=(loss,)) for loss in losses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    found = gradients(model)
for _ in range(20):
    for batch in data:
        loss_of(plain, batch).backward()
assert_close(found, gradients(plain), 1e-5)
"""


def test_backward_passes_at_once_lose_nothing(repository):
    """Many at a time: torch itself adds in any order then, so rounding may differ, and no more. In a process of its
    own, since torch crashes where a gradient is freed while it is added to."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(repository / "tests")])}
    done = subprocess.run([sys.executable, "-c", AT_ONCE], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
