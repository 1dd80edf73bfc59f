"""LSTM and GRU layers on integers against float32 and FBGEMM: ``python -m benchmarks.quantize_recurrent``.

A row is one layer of torch.nn, in one direction, on a whole batch of sequences: ``kind`` (lstm or gru), ``hidden`` (and
inputs), ``batch``, ``steps``. Peers: ``fp32``, the module itself; ``fbgemm``, what
``torch.ao.quantization.quantize_dynamic`` makes of it, with its one scale a tensor. ``ratios`` are seconds of a peer /
seconds of Sluice, and ``ratio`` is the one of fp32. ``error`` and ``peer_error`` are relative, of all outputs against
float64 with the float weights; ``linear_error`` is that of ``linear_dynamic`` with the same W_ih on the same rows.
``bits`` are the widths that x took; the state takes ``state_bits``.
"""

import copy
import warnings

import torch
from torch import nn

from benchmarks import harness
from torch_sluice.quantize import (
    DEFAULT_STATE_BITS,
    PackedMatrix,
    linear_dynamic,
    pack_linear_weight,
    run_recurrent,
)

KINDS = {"lstm": nn.LSTM, "gru": nn.GRU}
PEERS = ("fp32", "fbgemm")


def relative_error(got, expected) -> float:
    return ((got.double() - expected).norm() / expected.norm()).item()


def build_fbgemm(layer):
    """The peer, or None and the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.backends.quantized.engine = "fbgemm"
            model = torch.ao.quantization.quantize_dynamic(nn.Sequential(copy.deepcopy(layer)), {type(layer)})
        return model, None
    except Exception as error:  # whatever a peer raises: the run goes on without it, and says so
        return None, f"{type(error).__name__}: {error}"


def measure(case, options, machine) -> dict:
    kind, hidden, batch, steps = case
    torch.manual_seed(0)
    layer, x = KINDS[kind](hidden, hidden).eval(), torch.randn(steps, batch, hidden)
    names, values = zip(*layer.named_parameters(), strict=True)
    flat = [PackedMatrix(*pack_linear_weight(v)) if v.dim() == 2 else v.detach() for v in values]
    zeros, widths = torch.zeros(1, batch, hidden), []
    state = (zeros, zeros) if kind == "lstm" else zeros
    choice = dict(
        activation_bits=options.activation_bits, state_bits=options.state_bits, target_sqnr=options.target_sqnr
    )

    def ours(**more):
        return run_recurrent(kind, x, state, flat, True, 1, False, **choice, **more)[0]

    model, reason = build_fbgemm(layer)
    peers = {"fp32": lambda: layer(x)[0], "fbgemm": model and (lambda: model(x)[0])}
    timings = harness.time_interleaved({"sluice": ours, **peers}, options.repeats)
    expected = copy.deepcopy(layer).double()(x.double())[0]
    out, active = ours(on_bits=widths.append), [name for name in PEERS if peers[name]]
    weight = values[names.index("weight_ih_l0")]
    linear, _ = linear_dynamic(
        x,
        *flat[0][:2],
        out_features=weight.shape[0],
        activation_bits=options.activation_bits,
        target_sqnr=options.target_sqnr,
    )
    ratios = {name: timings.ratio(name, "sluice") for name in active}
    return {
        "operation": f"{kind}_dynamic",
        "kind": kind,
        "hidden": hidden,
        "batch": batch,
        "steps": steps,
        "dtype": "float32",
        "bits": sorted(set(widths[0][0].tolist())),
        "state_bits": sorted(set(widths[0][1].tolist())),
        "seconds": timings.seconds("sluice"),
        "peers": {name: timings.seconds(name) for name in PEERS},
        "missing": {"fbgemm": reason} if reason else {},
        "ratio": ratios["fp32"],
        "ratios": ratios,
        "error": relative_error(out, expected),
        "peer_error": {name: relative_error(peers[name](), expected) for name in active},
        "linear_error": relative_error(linear, nn.functional.linear(x.double(), weight.double())),
        **machine,
    }


def parse_options(arguments=None):
    parser = harness.make_parser(__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--hidden", type=int, nargs="+", default=[128, 256, 768])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, nargs="+", default=[40, 160])
    parser.add_argument("--activation-bits", type=_bits, default="sqnr", help="4, 7, 8, 16, sqnr or amax")
    parser.add_argument("--state-bits", type=_bits, default=DEFAULT_STATE_BITS, help="likewise, of the state")
    parser.add_argument("--target-sqnr", type=float, default=30.0, help="dB")
    options = parser.parse_args(arguments)
    if min(*options.hidden, *options.batch, *options.steps) < 1:
        parser.error("--hidden, --batch and --steps must be at least 1")
    if options.quick:
        options.hidden, options.steps = options.hidden[:1], options.steps[:1]
        options.repeats = min(options.repeats, 3)
    return options


def _bits(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def print_tables(rows) -> None:
    def show(table, name, form):
        return lambda row: form.format(row[table][name]) if name in row[table] else "-"

    harness.print_rows(
        "recurrent layers; ratios are peer / sluice",
        rows,
        {
            "layer": lambda row: row["kind"],
            "hidden": lambda row: str(row["hidden"]),
            "batch": lambda row: str(row["batch"]),
            "steps": lambda row: str(row["steps"]),
            "bits": lambda row: "/".join(",".join(map(str, row[key])) for key in ("bits", "state_bits")),
            "sluice": lambda row: harness.format_seconds(row["seconds"]),
            **{name: show("ratios", name, "{:.2f}") for name in PEERS},
            "error": lambda row: f"{row['error']:.2%}",
            "linear's": lambda row: f"{row['linear_error']:.2%}",
            "fbgemm's": show("peer_error", "fbgemm", "{:.2%}"),
        },
    )
    for reason in sorted({reason for row in rows for reason in row["missing"].values()}):
        harness.console.print(f"fbgemm did not run in some rows: {reason}", highlight=False)


@torch.inference_mode()
def main(arguments=None) -> list[dict]:
    options = parse_options(arguments)
    machine = harness.describe_machine(options.threads)
    harness.print_machine(machine)
    cases = [
        (kind, hidden, batch, steps)
        for kind in options.kinds
        for hidden in options.hidden
        for batch in options.batch
        for steps in options.steps
    ]
    rows = [measure(case, options, machine) for case in harness.track(cases, lambda case: f"{case[0]} {case[1]}")]
    print_tables(rows)
    harness.write_json(options.json, rows)
    return rows


if __name__ == "__main__":
    main()
