"""Writes to an argument count in its version, as those of torch's own operators do: autograd relies on that."""

import pytest
import torch
from support.devices import INDUCTOR
from support.operators import CALLS, ops, schema_of
from torch._subclasses import FakeTensorMode


def on_device(arguments, device):
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments]


def versions(name, arguments):
    """The version counters of the tensors, and by how much a call of torch's own would raise them."""
    counted = [
        (value, argument.alias_info is not None and argument.alias_info.is_write)
        for argument, value in zip(schema_of(name).arguments, arguments, strict=True)
        if isinstance(value, torch.Tensor)
    ]
    return [value._version for value, _ in counted], [int(written) for _, written in counted]


def call(name, arguments):
    before, expected = versions(name, arguments)
    getattr(ops, name)(*arguments)
    after, _ = versions(name, arguments)
    assert [new - old for new, old in zip(after, before, strict=True)] == expected


WRITING = [name for name in CALLS if schema_of(name).is_mutable]


@pytest.mark.parametrize("name", CALLS)
def test_writes_are_counted_once(name):
    call(name, CALLS[name]())


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRITING)
def test_writes_are_counted_once_on_cuda(name):
    call(name, on_device(CALLS[name](), "cuda"))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, FakeTensorMode])
@pytest.mark.parametrize("name", WRITING)
def test_writes_are_counted_in_every_mode(name, mode):
    arguments = None if mode is FakeTensorMode else CALLS[name]()
    with mode():
        call(name, CALLS[name]() if arguments is None else arguments)


def test_writes_through_a_copy_are_counted_once():
    sums, exponents, scale, _ = CALLS["read_accumulator"]()
    call("read_accumulator", [sums, exponents, scale, torch.ones(3, 5).mT])
    call("read_accumulator", [sums, exponents, scale, torch.ones(5, 7)[:, 1:4]])


def test_what_is_absent_or_empty_is_no_exception():
    call("accumulate_", [torch.zeros(3), None, torch.ones(3), 1.0, False, None])
    call("accumulate_", [torch.zeros(0), None, torch.ones(0), 1.0, False, None])
    call("accumulate_", [torch.zeros(()), None, torch.ones(()), 1.0, False, None])


def test_a_refused_call_counts_nothing():
    sums = torch.zeros(3)
    for grad, scale in ((torch.ones(4), 1.0), (torch.ones(3), float("nan"))):
        with pytest.raises((ValueError, RuntimeError), match="expected"):
            ops.accumulate_(sums, None, grad, scale, False, None)
    assert sums._version == 0


def test_a_view_and_its_base_share_the_count():
    base = torch.zeros(2, 5)
    ops.accumulate_(base[1], None, torch.ones(5), 1.0, False, None)
    assert base._version == 1


def test_a_parameter_stays_a_leaf():
    parameter = torch.nn.Parameter(torch.zeros(3))
    ops.accumulate_(parameter, None, torch.ones(3), 1.0, False, None)
    assert parameter._version == 1
    assert parameter.is_leaf
    assert parameter.requires_grad
    assert parameter.grad_fn is None
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("elements", [3, 0])
def test_what_autograd_saved_and_was_written_is_found(elements):
    def loss_of(write):
        x, saved = torch.ones(elements, requires_grad=True), torch.ones(elements)
        loss = (x * saved).sum()
        write(saved)
        return loss

    for write in (
        lambda saved: ops.accumulate_(saved, None, torch.ones(elements), 1.0, False, None),
        lambda saved: ops.read_accumulator(torch.ones(elements), None, 1.0, saved),
    ):
        with pytest.raises(RuntimeError, match="modified by an inplace operation.*is at version 1; expected version 0"):
            loss_of(write).backward()
    loss_of(lambda saved: ops.accumulate_(torch.ones(elements), None, saved, 1.0, False, None)).backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_writes_are_counted_when_compiled(backend):
    sums, grad = torch.zeros(3), torch.ones(3)
    torch.compile(lambda sums, grad: ops.accumulate_(sums, None, grad, 1.0, False, None), backend=backend)(sums, grad)
    assert sums._version >= 1
    assert sums.sum() == 3
