"""Quantised weights under torch.compile, torch.export, AOTInductor and TorchScript; and ONNX, which refuses."""

import copy

import pytest
import torch
from support.devices import INDUCTOR
from support.quantized_layers import NAMES, quantized, tied
from torch import nn

from torch_sluice.compress import QuantizedWeight, quantize_layer, unpack_weights


class Reader(nn.Module):
    """Looks at its weights, as modelling files of transformers do, and uses one outside its layer."""

    def __init__(self):
        super().__init__()
        self.first, self.table = nn.Linear(8, 12), nn.Embedding(30, 12)

    def forward(self, x, ids):
        x = x.to(self.first.weight.dtype).to(next(iter(self.parameters())).device)
        return nn.functional.linear(self.first(x).relu() + self.table(ids), self.table.weight)


def reader():
    torch.manual_seed(0)
    model = Reader().eval().requires_grad_(False)
    quantize_layer(model.first)
    model.table.weight = nn.Parameter(QuantizedWeight.from_float(model.table.weight), requires_grad=False)
    return model, (torch.randn(3, 8), torch.arange(3))


def models():
    for name in NAMES:
        layer, _, x = quantized(name)
        yield name, nn.Sequential(layer, nn.ReLU()), (x,)
    yield "tied", tied()[0], (torch.arange(6).reshape(2, 3),)
    yield "reader", *reader()


CASES = {name: (model, inputs) for name, model, inputs in models()}


@pytest.fixture(params=CASES)
def case(request):
    model, inputs = CASES[request.param]
    torch._dynamo.reset()
    with torch.no_grad():
        yield model, inputs, model(*inputs)


@pytest.mark.parametrize("strict", [True, False])
def test_it_is_exported(case, strict, tmp_path):
    model, inputs, expected = case
    program = torch.export.export(model, inputs, strict=strict)
    assert torch.equal(program.module()(*inputs), expected)
    called = {str(node.target) for node in program.graph.nodes if "sluice" in str(node.target)}
    assert not any("unpack" in name for name in called)
    torch.export.save(program, tmp_path / "model.pt2")
    assert torch.equal(torch.export.load(tmp_path / "model.pt2").module()(*inputs), expected)


def test_it_is_compiled_in_one_graph(case):
    model, inputs, expected = case
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs), expected)


@INDUCTOR
def test_inductor_takes_it(case):
    model, inputs, expected = case
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(*inputs), expected)


def test_a_compiled_model_follows_its_weights():
    layer = quantize_layer(nn.Linear(8, 4))
    compiled, x = torch.compile(layer, fullgraph=True, backend="aot_eager"), torch.randn(2, 8)
    with torch.no_grad():
        compiled(x)
        layer.weight.copy_(torch.randn(4, 8))
        layer.weight.set_target_sqnr(60.0)
        assert torch.equal(compiled(x), layer(x))


@INDUCTOR
def test_a_model_is_compiled_ahead_for_batches_of_any_size(tmp_path):
    layer, _, _ = quantized("linear")
    model = nn.Sequential(layer, nn.ReLU())
    batch = torch.export.Dim("batch", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 20),), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(path)
        for rows in (1, 5):
            x = torch.randn(rows, 20)
            assert torch.equal(run(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_takes_it(case, tmp_path):
    model, inputs, expected = case
    traced = torch.jit.trace(model, inputs, check_trace=False)
    assert torch.equal(traced(*inputs), expected)
    torch.jit.save(traced, tmp_path / "model.pt")
    assert torch.equal(torch.jit.load(tmp_path / "model.pt")(*inputs), expected)


@pytest.mark.parametrize("name", ["linear", "4 bits", "convolution", "embedding"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_layer_is_served_too(name):
    layer, _, x = quantized(name)
    with torch.no_grad():
        assert torch.equal(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_onnx_says_what_to_do(dynamo, tmp_path):
    pytest.importorskip("onnxscript")
    model, inputs = reader()
    with pytest.raises(Exception, match="ONNX has no operator for quantised weights.*unpack_weights"):
        torch.onnx.export(model, inputs, str(tmp_path / "model.onnx"), dynamo=dynamo, verbose=False)
    torch.onnx.export(
        unpack_weights(copy.deepcopy(model)), inputs, str(tmp_path / "model.onnx"), dynamo=True, verbose=False
    )
    assert (tmp_path / "model.onnx").stat().st_size > 0
