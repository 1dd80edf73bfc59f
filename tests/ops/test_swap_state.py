"""What a call of a swapped model needs belongs to that call: other threads, copies and casts don't disturb it."""

import copy
import pickle
import threading

import pytest
import torch

pytest.importorskip("transformers")

from support.gated_llama import draw, make

from torch_sluice import gate_parameters, restore
from torch_sluice.attention import DensityController


@torch.no_grad()
def test_threads_get_the_gates_of_their_own_tokens():
    model, failures = make(), []
    requests = [draw(tokens=30 + number, seed=number) for number in range(4)]
    expected = [model(request).logits for request in requests]
    start = threading.Barrier(4)

    def serve(number):
        start.wait()
        with torch.no_grad():
            for _ in range(10):
                try:
                    torch.testing.assert_close(model(requests[number]).logits, expected[number])
                except Exception as error:
                    failures.append(error)

    threads = [threading.Thread(target=serve, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_forward_that_was_broken_off_leaves_nothing_for_the_next():
    model, ids = make(), draw()
    expected, layer = model(ids).logits, model.model.layers[0].self_attn
    hook = layer.o_proj.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    early = layer.q_proj.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for handle in (early, hook):
        with pytest.raises(KeyboardInterrupt):
            model(draw(tokens=9))
        handle.remove()
    assert torch.equal(model(ids).logits, expected)


def test_copies_and_pickles_between_a_forward_and_its_loss():
    model = make(spread=0.5).train()
    controller = DensityController(model, steps=4)
    ids = draw()
    expected = model.eval()(ids).logits
    loss = model.train()(ids, labels=ids).loss
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    controller.loss(loss).backward()
    controller.step()
    controller.close()
    for other in (copied.eval(), pickled.eval()):
        assert torch.equal(other(ids).logits, expected)
        assert all(parameter.grad is None for parameter in gate_parameters(other))
        restore(other)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_of_transformers_under_a_controller(reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = make(spread=0.5, window=1, sinks=1).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        controller = DensityController(model, steps=4, rows=0.0)
        controller.strength = 2.0
        ids = draw()
        controller.loss(model(ids, labels=ids, use_cache=False).loss).backward()
        controller.step()
        gradients.append([parameter.grad for parameter in model.parameters()])
        assert controller.density < 0.9
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("cast", [lambda model: model.to(torch.bfloat16), lambda model: model.half()])
def test_casting_a_model_does_not_round_its_gates(cast):
    model = make()
    before = [parameter.detach().clone() for parameter in gate_parameters(model)]
    cast(model)
    assert model.model.embed_tokens.weight.dtype != torch.float32
    assert all(torch.equal(now, then) for now, then in zip(gate_parameters(model), before, strict=True))
    assert model(draw()).logits.isfinite().all()
    model.double()
    assert {parameter.dtype for parameter in gate_parameters(model)} == {torch.float64}
