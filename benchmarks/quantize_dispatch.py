"""What a layer with a quantised weight costs beside its kernel: ``python -m benchmarks.quantize_dispatch``.

A layer calls F.linear, F.conv2d or F.embedding as ever; torch hands the call to the weight, and that calls the
operator. Small layers, in eager mode. The peers:
    ``direct``    a module of its own class whose forward calls the operator, with packed weights as buffers, and asks
                  whether a monitor listens: what swapping modules would take
    ``float``     the layer in float32
    ``subclass``  a tensor subclass as small as it can be, in front of the float32 weight; ``subclass`` - ``float`` is
                  what torch itself takes to hand a call over to any tensor subclass
    ``torchao``   its int8 dynamic layer, where torchao is installed
``overhead`` is seconds of the layer - seconds of ``direct``, the median over rounds. ``ratio`` is ``direct`` / layer.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import harness
from torch_sluice.compress import quantize_layer
from torch_sluice.compress.quantized import POLICIES
from torch_sluice.monitor import bits as widths

CASES = {  # name -> (layer, input)
    "linear 16 to 16, 1 row": lambda: (nn.Linear(16, 16), torch.randn(1, 16)),
    "linear 384 to 384, 1 row": lambda: (nn.Linear(384, 384), torch.randn(1, 384)),
    "conv2d 8 to 8, 3 x 3, 4 x 4 pixels": lambda: (nn.Conv2d(8, 8, 3, padding=1), torch.randn(1, 8, 4, 4)),
    "embedding 100 x 16, 1 row": lambda: (nn.Embedding(100, 16), torch.tensor([3])),
}


class Direct(nn.Module):
    """Calls the operator of a layer with a quantised weight, and reads what it takes from attributes of its own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        weight, options = layer.weight, layer.weight.options
        self.register_buffer("packed", weight.packed)
        self.register_buffer("weight_scale", weight.scale.squeeze(1) if weight.kind == "rows" else weight.scale)
        self.register_buffer("bias", getattr(layer, "bias", None))
        self.kind, self.counting, self.groups = weight.kind, False, options.groups
        self.weight_bits, self.group_size, self.policy = options.weight_bits, options.group_size, options.policy
        self.target_sqnr, self.outlier_ratio = options.target_sqnr, options.outlier_ratio
        self.outputs, self.kernel_size = options.matrix()[0], list(options.shape[2:])
        if isinstance(layer, nn.Conv2d):
            self.stride, self.padding, self.dilation = list(layer.stride), list(layer.padding), list(layer.dilation)

    def forward(self, x):
        if self.kind == "rows":
            return F.embedding(x, self.packed).to(torch.float32) * self.weight_scale[x].unsqueeze(-1)
        if self.kind == "conv2d":
            out, bits = torch.ops.sluice.conv2d_dynamic.default(
                x, self.packed, self.weight_scale, self.bias, self.outputs, self.kernel_size, self.stride,
                self.padding, self.dilation, self.groups, self.weight_bits, self.group_size, POLICIES[self.policy],
                self.target_sqnr,
            )  # fmt: skip
            out = out if x.dim() == 4 else out[0]
        else:
            out, bits = torch.ops.sluice.linear_dynamic.default(
                x, self.packed, self.weight_scale, self.bias, self.outputs, self.weight_bits, self.group_size,
                POLICIES[self.policy], self.target_sqnr, True, self.outlier_ratio,
            )  # fmt: skip
        self.note(bits)
        return out

    def note(self, bits):
        if torch.compiler.is_compiling():
            return
        widths.record(bits, self)
        if self.counting:
            raise NotImplementedError


class Passing(torch.Tensor):
    """A tensor subclass that takes a call and hands it on with the tensor that it holds."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (F.linear, torch.conv2d, F.embedding):
            x, weight, *rest = args
            return func(x, weight.inner, *rest, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return cls(args[0].inner)  # detach, which is all that nn.Parameter asks for


def torchao_layer(layer: nn.Module) -> nn.Module | None:
    if not isinstance(layer, nn.Linear):
        return None
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return None
    other = nn.Sequential(copy.deepcopy(layer))
    quantize_(other, Int8DynamicActivationInt8WeightConfig())
    return other[0]


def measure(name, options, machine) -> dict:
    torch.manual_seed(0)
    layer, x = CASES[name]()
    layer.requires_grad_(False)
    passing = copy.deepcopy(layer)
    passing.weight = nn.Parameter(Passing(passing.weight.detach()), requires_grad=False)
    quantized = quantize_layer(copy.deepcopy(layer))
    models = {
        "sluice": quantized, "direct": Direct(quantized), "float": layer, "subclass": passing,
        "torchao": torchao_layer(layer),
    }  # fmt: skip
    with torch.inference_mode():
        assert torch.equal(models["sluice"](x), models["direct"](x))
        calls = {peer: None if model is None else (lambda model=model: model(x)) for peer, model in models.items()}
        timings = harness.time_interleaved(calls, options.repeats, shortest=5e-3)
    return {
        "operation": "dispatch", "case": name, "dtype": "float32", "seconds": timings.seconds("sluice"),
        "peers": {peer: timings.seconds(peer) for peer in models if peer != "sluice"},
        "overhead": (timings.ratio("sluice", "direct") - 1) * timings.seconds("direct"),
        "ratio": timings.ratio("direct", "sluice"), **machine,
    }  # fmt: skip


def main(arguments=None) -> list[dict]:
    parser = harness.make_parser(__doc__.splitlines()[0], repeats=31)
    parser.set_defaults(threads=1)
    options = parser.parse_args(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    cases = list(CASES)
    if options.quick:
        cases, options.repeats = cases[:2], min(options.repeats, 3)
    rows = [measure(name, options, machine) for name in harness.track(cases, str)]
    microseconds = lambda seconds: "-" if seconds is None else f"{seconds * 1e6:.2f}"  # noqa: E731
    columns = {
        "layer": lambda row: row["case"],
        "sluice": lambda row: microseconds(row["seconds"]),
        **{peer: (lambda row, peer=peer: microseconds(row["peers"][peer])) for peer in rows[0]["peers"]},
        "overhead": lambda row: microseconds(row["overhead"]),
    }
    harness.print_rows("A call of a layer in microseconds; overhead = sluice - direct", rows, columns)
    harness.write_json(options.json, rows)
    return rows


if __name__ == "__main__":
    main()
