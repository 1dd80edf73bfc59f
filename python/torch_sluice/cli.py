"""The command ``torch-sluice``. Only what a command needs is imported, so that ``info`` works on a bare install."""

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import NoReturn

# Options of train that change a preset: (option, type, help).
_OVERRIDES = (
    ("--steps", int, "optimizer steps"),
    ("--context", int, "bytes that a sequence holds"),
    ("--micro-batches", int, "micro-batches that are accumulated into a step"),
    ("--micro-size", int, "sequences in a micro-batch"),
    ("--layers", int, "layers of the model"),
    ("--width", int, "width of the model"),
    ("--heads", int, "attention heads"),
    ("--learning-rate", float, "peak learning rate"),
    ("--gate-learning-rate", float, "peak learning rate of the gates"),
    ("--target-density", float, "share of the pairs to keep, in (0, 1]"),
    ("--local-window", int, "nearest keys that are kept whatever the gate says"),
    ("--seed", int, "decides the weights, the batches and the noise"),
    ("--threads", int, "threads; default: as many as torch takes"),
)
_WITH_RESUME = (
    "resume",
    "json",
    "threads",
    "tensorboard",
    "metrics_port",
    "metrics_host",
)  # what may be said beside --resume
_WITH_RESUME_ON_MESH = ("resume", "json", "threads", "mesh", "schedule", "data_parallel", "backend", "save_every")


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, 2 for a mistake of the user, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # names of files may be no text of the terminal's encoding
        sys.stdout.reconfigure(errors="backslashreplace")
    options.arguments = sys.argv[1:] if arguments is None else arguments  # for the ranks of a mesh
    try:
        return options.run(options)
    except KeyboardInterrupt:
        return 130


def _fail(message: object) -> int:
    print(f"torch-sluice: error: {message}", file=sys.stderr)
    return 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the commands do: the usage, which argparse prints before, is longer."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ('{self.prog} --help' lists all options)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="torch-sluice",
        description="Gated sparse attention and mixed-precision gradient accumulation for PyTorch.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_train(commands)
    _add_compress(commands)
    _add_tune_comm(commands)
    _add_plan(commands)
    _add_info(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser, *_):
        import torch_sluice

        print(torch_sluice.__version__)
        parser.exit()


def _add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a small language model dense and with Sluice, and compare",
        description="Trains a small byte-level language model twice from the same weights on the same text: dense "
        "(SDPA) with ordinary gradient accumulation, and with Sluice's gated attention and accumulation. Ends with a "
        "table, results.json and report.html. Ctrl-C finishes the step, saves, and says how to resume.",
    )
    train.add_argument("--data", metavar="PATH", help="text file or folder; default: the Python standard library")
    train.add_argument(
        "--out", metavar="DIR", help="folder for checkpoint, results.json and report.html; default: sluice-run"
    )
    train.add_argument("--json", metavar="FILE", help="write the results to this file, too")
    train.add_argument(
        "--preset", choices=("demo", "long"), help="demo (default): minutes on two cores; long: about an hour"
    )
    train.add_argument(
        "--with-window",
        action="store_true",
        default=None,
        help="train a third side: a sliding window of the same density",
    )
    train.add_argument("--resume", metavar="DIR", help="continue the run in this folder exactly where it stopped")
    train.add_argument("--overwrite", action="store_true", default=None, help="replace an unfinished run in --out")
    train.add_argument(
        "--tensorboard", action="store_true", default=None, help="write scalars to DIR/tensorboard while training"
    )
    train.add_argument(
        "--metrics-port", type=int, metavar="N", help="serve Prometheus text while training; 0: on any free port"
    )
    train.add_argument("--metrics-host", metavar="HOST", help="address that it is served on; default: 127.0.0.1")
    mesh = train.add_argument_group("one side on several ranks (processes); docs/parallel.md")
    mesh.add_argument(
        "--mesh", metavar="SIZES", help="ranks for data, tensor and pipeline parallel, as in dp=2,tp=2,pp=2"
    )
    mesh.add_argument(
        "--schedule",
        choices=("gpipe", "1f1b", "interleaved", "interleaved-zero-bubble", "zero-bubble"),
        help="of the pipeline; default: 1f1b",
    )
    mesh.add_argument("--data-parallel", choices=("ddp", "fsdp"), help="DDP (default) or FSDP2")
    mesh.add_argument("--backend", choices=("sluice", "gloo"), help="of the process group; default: sluice")
    mesh.add_argument("--dense", action="store_true", default=None, help="train the dense side instead of Sluice's")
    mesh.add_argument("--save-every", type=int, metavar="N", help="steps between checkpoints; default: one a minute")
    changes = train.add_argument_group("changes to the preset")
    for option, kind, text in _OVERRIDES:
        changes.add_argument(option, type=kind, metavar="N" if kind is int else "X", help=text)
    train.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    try:
        from rich.console import Console

        from torch_sluice.train.errors import TrainError
        from torch_sluice.train.main import Interrupted, execute_run, resume_run, start_run, write_report
    except ModuleNotFoundError as error:
        return _fail(f"'train' needs the package {error.name}: pip install 'torch-sluice[train]'")
    console = Console()
    run = None
    try:
        if options.metrics_host is not None and options.metrics_port is None:
            return _fail(f"--metrics-host is {options.metrics_host} without --metrics-port, expected both or none")
        if _is_on_mesh(options):
            return _train_on_mesh(options)
        if options.resume is not None:
            _refuse_with_resume(options, _WITH_RESUME)
            run = resume_run(Path(options.resume), options.threads)
        else:
            run = start_run(
                _settings(options), options.data, Path(options.out or "sluice-run"), bool(options.overwrite)
            )
        result = execute_run(
            run,
            console,
            Path(options.json) if options.json else None,
            tensorboard=bool(options.tensorboard),
            metrics_port=options.metrics_port,
            metrics_host=options.metrics_host,
        )
        from torch_sluice.report import print_comparison

        print_comparison(result, console)
        print(f"Report: {write_report(result, run.folder)}")
    except Interrupted:
        print(f"Stopped after step {run.step} of {run.settings.steps}, and saved.")
        return _say_how_to_resume(run)
    except KeyboardInterrupt:
        print("Stopped.")
        return _say_how_to_resume(run)
    except TrainError as error:
        return _fail(error)
    finally:
        if run is not None:
            run.close()
    return 0


def _settings(options: argparse.Namespace):
    from torch_sluice.train.settings import PRESETS

    names = [option.removeprefix("--").replace("-", "_") for option, *_ in _OVERRIDES]
    changes = {name: getattr(options, name) for name in (*names, "with_window")}
    return PRESETS[options.preset or "demo"].override(**changes)


def _is_on_mesh(options: argparse.Namespace) -> bool:
    """Whether --mesh is given, or --resume names a run that was on one."""
    if options.mesh is not None:
        return True
    if options.resume is not None and (Path(options.resume) / "checkpoints").is_dir():
        return True
    from torch_sluice.train.errors import TrainError

    for name in ("schedule", "data_parallel", "backend", "dense", "save_every"):
        if getattr(options, name) is not None:
            raise TrainError(f"--{name.replace('_', '-')} is given without --mesh, expected both or none")
    return False


def _train_on_mesh(options: argparse.Namespace) -> int:
    from torch_sluice.train.mesh.main import run_mesh

    if options.resume is not None:
        _refuse_with_resume(options, _WITH_RESUME_ON_MESH)
    return run_mesh(options, _settings(options) if options.resume is None else None)


def _say_how_to_resume(run) -> int:
    if run is not None and run.saved:
        print(f"To continue: torch-sluice train --resume {shlex.quote(str(run.folder))}")
    return 130


def _refuse_with_resume(options: argparse.Namespace, allowed: tuple[str, ...]) -> None:
    """A resumed run keeps its settings: naming others is a mistake to point out, not to pass over."""
    from torch_sluice.train.errors import TrainError

    own = (*allowed, "run", "arguments")
    given = [name for name, value in vars(options).items() if value is not None and name not in own]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise TrainError(
            f"--resume continues a run with its own settings: leave out {names} "
            f"(only {', '.join('--' + name.replace('_', '-') for name in allowed[1:])} go with it)"
        )


def _add_plan(commands) -> None:
    from torch_sluice.plan.command import add_command

    add_command(commands, _fail)


def _add_compress(commands) -> None:
    compress = commands.add_parser(
        "compress",
        help="prune and quantise a model of yours, as far as its metric allows",
        description="Calls a function of yours that gives (model, example_inputs, data) or (model, example_inputs, "
        "data, metric), or a dict of arguments of torch_sluice.compress; prunes and quantises the model as far as the "
        "share of the metric allows, measured on the data; ends with a table. Only the function that you name is run, "
        "and what its module imports.",
    )
    compress.add_argument(
        "--model", required=True, metavar="PACKAGE.MODULE:FUNCTION", help="what gives the model and its data"
    )
    compress.add_argument("--path", default=".", metavar="DIR", help="where to import it from; default: this folder")
    compress.add_argument(
        "--keep", type=float, metavar="X", help="share of the metric to keep, in (0, 1]; default: .97"
    )
    compress.add_argument(
        "--policy", choices=("sensitivity", "quantile"), help="measured sensitivity (default), or a quantile of norms"
    )
    compress.add_argument("--budget", type=float, metavar="MS", help="milliseconds at which pruning may stop")
    compress.add_argument("--no-prune", action="store_true", help="only quantise")
    compress.add_argument("--no-quantize", action="store_true", help="only prune; the result can be trained further")
    compress.add_argument("--weight-bits", type=int, choices=(4, 8), help="of quantised weights; default: 8")
    compress.add_argument(
        "--quantize-policy", choices=("sqnr", "amax"), help="what chooses the bits of activations; default: sqnr"
    )
    compress.add_argument("--threads", type=int, metavar="N", help="threads; default: as many as torch takes")
    compress.add_argument("--out", metavar="FILE", help="save the result here, for torch_sluice.compress.load")
    compress.add_argument("--json", metavar="FILE", help="write the report as JSON")
    compress.add_argument("--report", metavar="FILE", help="write the report as a page for the browser")
    compress.set_defaults(run=_compress)


def _compress(options: argparse.Namespace) -> int:
    try:
        import jinja2  # noqa: F401  # before the work, not after it
        import safetensors  # noqa: F401
        from rich.console import Console

        from torch_sluice.compress.command import CompressError, run
    except ModuleNotFoundError as error:
        return _fail(f"'compress' needs the package {error.name}: pip install 'torch-sluice[compress]'")
    try:
        run(options, Console())
    except (CompressError, OSError) as error:
        return _fail(error)
    if options.out:
        print(f"Saved: {options.out}; torch_sluice.compress.load({options.out!r}, model) gives it back.")
    return 0


def _add_tune_comm(commands) -> None:
    tune = commands.add_parser(
        "tune-comm",
        help="measure which algorithm of the process groups serves which size on this machine",
        description="Measures, with processes of this machine, which algorithm of the process groups serves which size "
        "best, and keeps the result where groups that are made later find it. Takes some seconds for each number of "
        "ranks; nothing else should be running.",
    )
    tune.add_argument(
        "--ranks", type=int, nargs="+", default=[2, 4], metavar="N", help="ranks on this machine; default: 2 4"
    )
    tune.add_argument("--rounds", type=int, default=9, metavar="N", help="turns of the alternatives; default: 9")
    tune.add_argument("--out", metavar="FILE", help="where to keep it; default: the user's configuration")
    tune.add_argument("--dry-run", action="store_true", help="measure and show, write nothing")
    tune.set_defaults(run=_tune_comm)


def _tune_comm(options: argparse.Namespace) -> int:
    if min(options.ranks) < 2 or max(options.ranks) > 64:
        return _fail(f"--ranks is {' '.join(map(str, options.ranks))}, expected numbers from 2 to 64")
    if options.rounds < 1:
        return _fail(f"--rounds is {options.rounds}, expected 1 or more")
    try:
        from rich.console import Console

        from torch_sluice.parallel.tune_report import run
        from torch_sluice.parallel.tuning import tuning_path
    except ModuleNotFoundError as error:
        return _fail(f"'tune-comm' needs the package {error.name}: pip install 'torch-sluice[train]'")
    path = None if options.dry_run else Path(options.out) if options.out else tuning_path()
    try:
        run(sorted(set(options.ranks)), options.rounds, path, Console())
    except (OSError, RuntimeError, ImportError) as error:
        return _fail(error)
    return 0


def _add_info(commands) -> None:
    text = "show what the plugin sees: torch, ABI, processor, kernels, and what is missing and how to get it"
    info = commands.add_parser("info", help=text, description=text[0].upper() + text[1:] + ".")
    info.add_argument("--json", action="store_true", help="print it as JSON")
    info.set_defaults(run=_info)


def _info(options: argparse.Namespace) -> int:
    from torch_sluice.info import describe_plugin, fact_lines

    facts = describe_plugin()
    print(json.dumps(facts, indent=1) if options.json else "\n".join(fact_lines(facts)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
