"""Quantised layers against FBGEMM, torchao, ONNX Runtime and float32: ``python -m benchmarks.quantize``.

A row is one layer on one input: ``op``, ``m`` (rows, or output pixels), ``n``, ``k``, ``weight_bits``, ``bits`` (the
widths that activations took), ``inputs`` (plain; with outlier tokens: two rows times 100; with outlier channels: four
channels times 50), ``seconds``, ``peers``, ``error`` and ``peer_error`` (relative, against float64 with the float
weight; with outlier tokens that of the other rows, which is where a scale for the whole tensor leaks to), ``isa``, and
``share``, the multiplications a second as a share of what ``sl_quantize_run_peak`` reaches on as many threads: the
sequence that multiplies int8 by int8 on this tier, on registers. 4-bit weights need fewer instructions, so they may
exceed it. A peer that is absent or fails is named with its reason. FBGEMM has no dynamic convolution: its static one,
whose scales are known in advance, stands in.
"""

import ctypes
import threading
import time

import torch
from torch import nn

import torch_sluice
from benchmarks import harness
from benchmarks.quantize_peers import PEERS, build_peers
from torch_sluice.quantize import conv2d_dynamic, linear_dynamic, pack_conv2d_weight, pack_linear_weight

LINEAR = {"768x3072": (768, 3072), "3072x768": (3072, 768), "4096x4096": (4096, 4096)}
# channels, out, kernel, stride, padding, height, width: of a ResNet on small images, and of torchcrepe.
CONVOLUTIONS = {
    "resnet 64": (64, 64, (3, 3), 1, 1, 32, 32),
    "resnet 128": (128, 128, (3, 3), 1, 1, 16, 16),
    "resnet 256": (256, 256, (3, 3), 1, 1, 8, 8),
    "resnet 1x1": (128, 256, (1, 1), 2, 0, 16, 16),
    "crepe 1": (1, 1024, (512, 1), (4, 1), (254, 0), 1024, 1),
    "crepe 2": (1024, 128, (64, 1), 1, (32, 0), 128, 1),
    "crepe 5": (128, 256, (64, 1), 1, (32, 0), 16, 1),
}
INPUTS = ("plain", "tokens", "channels")
WEIGHTS = {"int8": (8, 0), "int4": (4, 128)}


def measure_peak(threads: int, seconds: float = 0.3) -> float:
    """int8 multiply-accumulates a second of the tier's own sequence on this many threads: the best of several."""
    run = ctypes.CDLL(torch_sluice.library_path()).sl_quantize_run_peak
    run.restype, run.argtypes = ctypes.c_int64, [ctypes.c_int64]
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        done = [0] * threads

        def work(i, done=done):
            done[i] = run(200_000_000)

        workers = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
        start = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, sum(done) / (time.perf_counter() - start))
    return best


def make_input(kind: str, rows: int, columns: int) -> torch.Tensor:
    x = torch.randn(rows, columns)
    if kind == "tokens":
        x[:: max(1, rows // 2)] *= 100
    elif kind == "channels":
        x[:, :: columns // 4] *= 50
    return x


def relative_error(got, expected, rows) -> float:
    got, expected = got.double()[rows], expected[rows]
    return ((got - expected).norm() / expected.norm()).item()


def measure(case, layer, x, ours, ops, options, machine, peak, rows=slice(None)) -> dict:
    """Times ours and the peers on x; case has what the row says of the shape."""
    peers, missing = build_peers(layer, x, options.threads, options.compiled)
    calls = {"sluice": lambda: ours()[0], **{name: call for name, call in peers.items() if name in options.peers}}
    timings = harness.time_interleaved(calls, options.repeats)
    weight, bias = layer.weight.double(), layer.bias.double()
    if isinstance(layer, nn.Conv2d):
        expected = nn.functional.conv2d(x.double(), weight, bias, layer.stride, layer.padding)
    else:
        expected = nn.functional.linear(x.double(), weight, bias)
    out, bits = ours()
    seconds = timings.seconds("sluice")
    return {
        **case,
        "bits": sorted(set(bits.tolist())),
        "seconds": seconds,
        "peers": {name: timings.seconds(name) if name in calls else None for name in PEERS},
        "missing": {name: reason for name, reason in missing.items() if name in options.peers},
        "ratios": {name: timings.ratio(name, "sluice") for name in PEERS if name in calls},
        "error": relative_error(out, expected, rows),
        "peer_error": {name: relative_error(peers[name](), expected, rows) for name in PEERS if name in calls},
        "share": ops / seconds / peak,
        "peak": peak,
        **machine,
    }


def measure_linear(case, options, machine, peak) -> dict:
    name, rows, weights, kind = case
    inputs, outputs = LINEAR[name]
    torch.manual_seed(0)
    layer, x = nn.Linear(inputs, outputs), make_input(kind, rows, inputs)
    bits, group_size = WEIGHTS[weights]
    packed = pack_linear_weight(layer.weight, bits, group_size)
    bias = layer.bias.detach()
    choice = dict(activation_bits=options.activation_bits, target_sqnr=options.target_sqnr)

    def ours():
        return linear_dynamic(x, *packed, bias, out_features=outputs, weight_bits=bits, group_size=group_size, **choice)

    others = slice(None)
    if kind == "tokens" and rows > 2:
        others = torch.ones(rows, dtype=torch.bool)
        others[:: max(1, rows // 2)] = False
    shape = {"op": "linear_dynamic", "m": rows, "n": outputs, "k": inputs, "weight_bits": bits, "inputs": kind}
    return measure(shape, layer, x, ours, rows * inputs * outputs, options, machine, peak, others)


def measure_convolution(case, options, machine, peak) -> dict:
    name, batch, weights = case
    channels, outputs, kernel, stride, padding, height, width = CONVOLUTIONS[name]
    torch.manual_seed(0)
    layer = nn.Conv2d(channels, outputs, kernel, stride, padding)
    x = torch.randn(batch, channels, height, width)
    bits, group_size = WEIGHTS[weights]
    packed, bias = pack_conv2d_weight(layer.weight, bits, group_size), layer.bias.detach()
    sizes = dict(out_channels=outputs, kernel_size=kernel, stride=layer.stride, padding=layer.padding)
    choice = dict(activation_bits=options.activation_bits, target_sqnr=options.target_sqnr)

    def ours():
        return conv2d_dynamic(x, *packed, bias, weight_bits=bits, group_size=group_size, **sizes, **choice)

    depth = channels * kernel[0] * kernel[1]
    pixels = ours()[0].numel() // outputs
    shape = {"op": "conv2d_dynamic", "m": pixels, "n": outputs, "k": depth, "weight_bits": bits, "inputs": name}
    return measure(shape, layer, x, ours, pixels * outputs * depth, options, machine, peak)


def parse_options(arguments=None):
    parser = harness.make_parser(__doc__.splitlines()[0], repeats=9)
    parser.add_argument("--linear", nargs="*", choices=LINEAR, default=["768x3072", "4096x4096"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 256])
    parser.add_argument("--inputs", nargs="+", choices=INPUTS, default=list(INPUTS))
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument("--convolutions", nargs="*", choices=CONVOLUTIONS, default=list(CONVOLUTIONS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images of a convolution")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--compiled", action="store_true", help="torchao under torch.compile")
    parser.add_argument("--activation-bits", type=_bits, default="sqnr", help="4, 7, 8, 16, sqnr or amax")
    parser.add_argument("--target-sqnr", type=float, default=30.0, help="dB")
    options = parser.parse_args(arguments)
    if min(*options.rows, *options.batch) < 1:
        parser.error("--rows and --batch must be at least 1")
    if options.quick:
        options.linear, options.rows, options.inputs = options.linear[:1], options.rows[:2], options.inputs[:2]
        options.convolutions, options.batch = options.convolutions[:1], options.batch[:1]
        options.repeats = min(options.repeats, 3)
    return options


def _bits(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def show_ratio(name):
    return lambda row: f"{row['ratios'][name]:.2f}" if name in row["ratios"] else "-"


def print_tables(rows) -> None:
    harness.print_rows(
        "quantised layers; ratios are peer / sluice",
        rows,
        {
            "op": lambda row: row["op"].removesuffix("_dynamic"),
            "m x n x k": lambda row: f"{row['m']} x {row['n']} x {row['k']}",
            "weight": lambda row: f"int{row['weight_bits']}",
            "input": lambda row: row["inputs"],
            "bits": lambda row: ",".join(map(str, row["bits"])),
            "sluice": lambda row: harness.format_seconds(row["seconds"]),
            **{name: show_ratio(name) for name in PEERS},
            "of peak": lambda row: f"{row['share']:.0%}",
            "error": lambda row: f"{row['error']:.2%}",
            "fbgemm's": lambda row: f"{row['peer_error']['fbgemm']:.2%}" if "fbgemm" in row["peer_error"] else "-",
        },
    )
    reasons = {(name, reason) for row in rows for name, reason in row["missing"].items()}
    for name, reason in sorted(reasons):
        harness.console.print(f"{name} did not run in some rows: {reason}", highlight=False)


@torch.inference_mode()
def main(arguments=None) -> None:
    options = parse_options(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    peak = measure_peak(options.threads)
    harness.console.print(f"int8 peak {peak / 1e9:.0f} G multiply-accumulates/s", highlight=False)
    steps = [
        (measure_linear, (name, rows, weights, kind))
        for name in options.linear
        for rows in options.rows
        for weights in options.weights
        for kind in options.inputs
    ]
    steps += [
        (measure_convolution, (name, batch, weights))
        for name in options.convolutions
        for batch in options.batch
        for weights in options.weights
    ]
    rows = [run(case, options, machine, peak) for run, case in harness.track(steps, lambda step: str(step[1]))]
    if rows:
        print_tables(rows)
    harness.write_json(options.json, rows)


if __name__ == "__main__":
    main()
