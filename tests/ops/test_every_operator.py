"""What holds for every operator of torch.ops.sluice, whichever its schema: a tensor that it does not take is named."""

import os
import re
import subprocess
import sys

import pytest
import torch
from support.operators import CALLS, is_tensor, ops, schema_of
from torch._subclasses import FakeTensorMode

import torch_sluice


def tensor_arguments(select=lambda argument: True):
    """(operator, index, name of the argument) of all tensor arguments that are selected."""
    return [
        pytest.param(name, index, argument.name, id=f"{name}-{argument.name}")
        for name in CALLS
        for index, argument in enumerate(schema_of(name).arguments)
        if is_tensor(argument) and select(argument)
    ]


def expect_refusal(name, arguments, message):
    # From torch 2.15 on, what is a ValueError in the library arrives as a RuntimeError.
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        getattr(ops, name)(*arguments)
    assert not re.search(r"\.(h|cpp):\d+|registered at|/site-packages/", str(caught.value))


def test_no_operator_is_forgotten():
    names = {name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if "sluice::" in name}
    assert names == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_the_arguments_below_are_right(name):
    getattr(ops, name)(*CALLS[name]())


@pytest.mark.parametrize(
    ("name", "index", "argument"), tensor_arguments(lambda argument: str(argument.type) == "Tensor")
)
def test_none_is_named(name, index, argument):
    arguments = CALLS[name]()
    arguments[index] = None
    expect_refusal(name, arguments, f"^{argument} is None, expected a tensor")


@pytest.mark.parametrize("name", CALLS)
def test_none_is_named_whatever_surrounds_the_call(name):
    """Autograd and autocast have kernels of their own, before those of the device."""
    for index, argument in enumerate(schema_of(name).arguments):
        if str(argument.type) == "Tensor":
            arguments = CALLS[name]()
            for value in arguments:
                if isinstance(value, torch.Tensor):
                    value.requires_grad_(value.is_floating_point())
            arguments[index] = None
            expect_refusal(name, arguments, f"^{argument.name} is None, expected a tensor")
            with torch.autocast("cpu"):
                expect_refusal(name, arguments, f"^{argument.name} is None, expected a tensor")


@pytest.mark.parametrize("name", CALLS)
def test_nothing_but_none_is_named(name):
    arguments = CALLS[name]()
    tensors = [index for index, argument in enumerate(schema_of(name).arguments) if is_tensor(argument)]
    for index in tensors:
        arguments[index] = None
    expect_refusal(name, arguments, f"^{schema_of(name).arguments[0].name} is None, expected a tensor")


@pytest.mark.parametrize("kind", ["fake", "meta"])
@pytest.mark.parametrize(
    ("name", "index", "argument"), tensor_arguments(lambda argument: str(argument.type) == "Tensor")
)
def test_none_is_named_in_tracing(name, index, argument, kind):
    if kind == "fake":
        with FakeTensorMode():
            arguments = CALLS[name]()
            arguments[index] = None
            if any(isinstance(value, torch.Tensor) for value in arguments):
                expect_refusal(name, arguments, f"^{argument} is None, expected a tensor")
    else:
        arguments = [value.to("meta") if isinstance(value, torch.Tensor) else value for value in CALLS[name]()]
        arguments[index] = None
        expect_refusal(name, arguments, f"^{argument} is None, expected a tensor")


LAYOUTS = {
    "sparse_coo": lambda tensor: tensor.to_sparse(),
    "sparse_csr": lambda tensor: torch.ones(2, 2).to_sparse_csr(),
    "mkldnn": lambda tensor: torch.ones(2, 2).to_mkldnn(),
    "jagged": lambda tensor: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("name", "index", "argument"), tensor_arguments())
def test_another_layout_is_named(name, index, argument, layout):
    arguments = CALLS[name]()
    arguments[index] = LAYOUTS[layout](arguments[index])
    expect_refusal(name, arguments, f"^{argument} has the layout {layout}, expected a dense tensor, torch.strided")


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("name", "index", "argument"), tensor_arguments())
def test_a_nested_tensor_is_named(name, index, argument):
    arguments = CALLS[name]()
    arguments[index] = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    expect_refusal(name, arguments, f"^{argument} is a nested tensor, expected a dense tensor")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize(("name", "index", "argument"), tensor_arguments())
def test_another_kind_of_dtype_is_named(name, index, argument):
    for odd in (
        torch.ones(2, 2, dtype=torch.complex64),
        torch.ones(2, 2, dtype=torch.float8_e4m3fn),
        torch.empty(2, 2, dtype=torch.bits8),
        torch.quantize_per_tensor(torch.ones(2, 2), 1.0, 0, torch.quint8),
    ):
        arguments = CALLS[name]()
        arguments[index] = odd
        expect_refusal(name, arguments, r"^\w+ (is|has) .*, expected ")


@pytest.mark.parametrize(("name", "index", "argument"), tensor_arguments())
def test_meta_beside_cpu_is_named(name, index, argument):
    arguments = CALLS[name]()
    arguments[index] = arguments[index].to("meta")
    tensors = [a.name for a in schema_of(name).arguments if is_tensor(a)]
    if len(tensors) > 1:
        named = argument if argument != tensors[0] else tensors[1]
        expect_refusal(name, arguments, f"^{named} is on (meta|cpu), expected the device of {tensors[0]}, which is ")


WITHOUT_THE_PACKAGE = """
import re, sys, torch
torch.ops.load_library(sys.argv[1])
for name, arguments, expected in (
    ("measure_gradient", (torch.ones(3, device="meta"),), "grad is float32 [3] on meta, expected it on cpu"),
    ("accumulate_", (torch.ones(3), None, torch.ones(3, device="meta"), 1.0, False, None), "grad is float32 [3] on"),
    ("channel_norms", (None, 0), "weight is None, expected a tensor"),
):
    try:
        getattr(torch.ops.sluice, name)(*arguments)
    except (ValueError, RuntimeError) as error:
        assert str(error).startswith(expected), error
        assert "registered at" not in str(error), error
    else:
        raise AssertionError(name)
x, w = torch.ones(3, requires_grad=True), torch.ones(3)
y = (x * w).sum()
torch.ops.sluice.accumulate_(w, None, torch.ones(3), 1.0, False, None)
try:
    y.backward()
except RuntimeError as error:
    assert "modified by an inplace operation" in str(error), error
    print("right")
"""


def test_the_library_alone_does_the_same():
    process = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, torch_sluice.library_path()],
        capture_output=True, text=True, env=dict(os.environ),
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (0, "right\n"), process.stderr


def test_no_path_of_the_build_is_in_the_library():
    with open(torch_sluice.library_path(), "rb") as file:
        text = file.read()
    assert b"torch/csrc/stable/" in text  # paths of torch's headers are there, relative ones
    assert not re.search(rb"/[\w./-]*torch/csrc/stable/|/[\w./-]+/torch_bindings/", text)


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name):
    torch.library.opcheck(getattr(ops, name).default, tuple(CALLS[name]()))
