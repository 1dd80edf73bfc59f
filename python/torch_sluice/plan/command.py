"""``torch-sluice plan``: a layout for a model and a cluster, as text or JSON."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from torch_sluice.plan.device import device_names, load_cluster
from torch_sluice.plan.planning import Plan, plan
from torch_sluice.plan.shapes import PRECISIONS

_SHAPE = ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab", "sequence")
_RANGES = ("dp", "tp", "pp", "cp", "vpp", "micro_batch", "zero")


def add_command(commands, fail) -> None:
    """Adds the command to argparse's subparsers; ``fail(message)`` prints a mistake and returns the exit code."""
    parser = commands.add_parser(
        "plan",
        help="find the layout under which a model trains fastest on a cluster",
        description="Predicts the step time and memory of every data, tensor, pipeline and context-parallel layout of "
        "a model on a cluster, and prints the fastest that fits, why, and how to start it. Nothing is run.",
    )
    parser.add_argument("--model", metavar="PATH", help="a transformers config.json, or the folder that holds it")
    for name in _SHAPE:
        text = {"ffn": "width inside the MLP", "sequence": "tokens of a sequence"}.get(name, f"{name} of the model")
        parser.add_argument(_option(name), type=int, metavar="N", help=f"{text}, instead of or beside --model")
    parser.add_argument("--gated", action=argparse.BooleanOptionalAction, help="whether the MLP has a gate (SwiGLU)")
    known = ", ".join(device_names())
    parser.add_argument(
        "--cluster", default="h100-80g", metavar="NAME", help=f"{known}, or a TOML file; default: h100-80g"
    )
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs to use")
    parser.add_argument("--global-batch", type=int, required=True, metavar="N", help="sequences of a step")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16", help="of the layers' products")
    for name in _RANGES:
        parser.add_argument(_option(name), metavar="N or N-M", help=f"values of {name} to search")
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON")
    parser.set_defaults(run=lambda options: _run(options, fail))


def _option(name):
    return "--" + name.replace("_", "-")


def _run(options: argparse.Namespace, fail) -> int:
    try:
        space = {name: _range(name, getattr(options, name)) for name in _RANGES if getattr(options, name) is not None}
        shape = {name: getattr(options, name) for name in (*_SHAPE, "gated") if getattr(options, name) is not None}
        result = plan(
            _config(options.model) | shape, load_cluster(options.cluster), gpus=options.gpus,
            global_batch=options.global_batch, space=space, layout={"precision": options.precision},
        )  # fmt: skip
        print(result.explain())
        if options.json:
            path = Path(options.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(describe(result), indent=1) + "\n")
    except (ValueError, MemoryError, OSError) as error:
        return fail(error)
    return 0


def _config(path):
    """The numbers of a config.json, without what transformers does to them: names are read as they stand."""
    if path is None:
        return {}
    file = Path(path) / "config.json" if Path(path).is_dir() else Path(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"--model {file} is no JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"--model {file} holds {type(values).__name__}, expected an object")
    return values.get("text_config") or values


def _range(name, text):
    least, _, most = text.partition("-")
    try:
        return int(least), int(most or least)
    except ValueError:
        raise ValueError(
            f"{_option(name)} is {text!r}, expected a whole number, or two with a hyphen between"
        ) from None


def describe(result: Plan) -> dict:
    """The plan as what JSON can hold."""
    return {
        "layout": asdict(result.layout),
        "estimate": asdict(result.estimate),
        "mesh": result.mesh,
        "command": result.command,
        "reasons": list(result.reasons),
        "others": [{"layout": asdict(layout), "estimate": asdict(estimate)} for layout, estimate in result.others],
        "predicted": result.predicted,
    }
