"""``torch-sluice train --mesh``: starts the ranks if need be, and is what each of them runs."""

import argparse
import contextlib
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from torch import distributed

from torch_sluice.train.data import load_corpus
from torch_sluice.train.errors import TrainError
from torch_sluice.train.folder import FolderLock, make_folder
from torch_sluice.train.loop import Interrupted
from torch_sluice.train.main import check_writable, refuse_to_replace, write_json
from torch_sluice.train.mesh.checkpoint import newest_checkpoint, read_state, remove_checkpoints
from torch_sluice.train.mesh.launch import (
    choose_threads,
    is_rank,
    join_group,
    start_ranks,
    was_restarted,
    was_started_here,
)
from torch_sluice.train.mesh.layout import Layout, check_fit, fit_micro_batches, parse_mesh
from torch_sluice.train.mesh.loop import MeshRun
from torch_sluice.train.mesh.progress import MeshProgress
from torch_sluice.train.settings import Settings

_NOT_HERE = ("with_window", "tensorboard", "metrics_port", "metrics_host")


def run_mesh(options: argparse.Namespace, settings: Settings | None) -> int:
    """Runs the command; ``settings`` are those that the options give, None to go on with those of ``--resume``.

    Returns the exit code.
    """
    for name in _NOT_HERE:
        value = getattr(options, name)
        if value is not None and value is not False:  # a port may be 0
            raise TrainError(f"--{name.replace('_', '-')} does not go with --mesh, expected one of them")
    if options.save_every is not None and options.save_every < 1:
        raise TrainError(f"--save-every is {options.save_every}, expected at least 1 step")
    folder = Path(options.resume or options.out or "sluice-run")
    checkpoint, state = _find_checkpoint(options, folder)
    if state is not None:
        settings = Settings.from_dict(state["settings"]).override(threads=options.threads)
        saved = Layout.from_dict(state["layout"])
        layout = _layout(options, saved)
        data = state["data"]
    else:
        layout, data = _layout(options, None), options.data and str(Path(options.data).resolve())
        if options.micro_batches is None:
            settings = fit_micro_batches(settings, layout)
    check_fit(settings, layout)
    if not is_rank():
        corpus = load_corpus(data, settings.context, folder)  # its faults show here once and not on every rank
        if state is not None:
            corpus.check_fingerprint(state["fingerprint"])
        make_folder(folder)
        if options.json:
            check_writable(Path(options.json))
        with contextlib.closing(_lock(options, folder)):
            return _start(options, folder, layout)
    corpus = load_corpus(data, settings.context, folder)
    if state is not None:
        corpus.check_fingerprint(state["fingerprint"])
    make_folder(folder)
    with contextlib.ExitStack() as held:
        if os.environ["RANK"] == "0" and not was_started_here():
            held.enter_context(contextlib.closing(_lock(options, folder)))
        return _run_rank(options, settings, layout, corpus, folder, data, checkpoint, state)


def _lock(options: argparse.Namespace, folder: Path) -> FolderLock:
    return FolderLock(folder, "--out" if options.resume is None else "--resume")


def _layout(options: argparse.Namespace, saved: Layout | None) -> Layout:
    names = {"schedule": options.schedule, "data_parallel": options.data_parallel, "backend": options.backend}
    names = {name: value for name, value in names.items() if value is not None}
    if saved is not None:
        names = {"schedule": saved.schedule, "data_parallel": saved.data_parallel, "backend": saved.backend} | names
        names["dense"] = saved.dense
        return parse_mesh(options.mesh, **names) if options.mesh else replace(saved, **names)
    return parse_mesh(options.mesh, dense=bool(options.dense), **names)


def _find_checkpoint(options: argparse.Namespace, folder: Path) -> tuple[Path | None, dict | None]:
    """The checkpoint to go on from: that of --resume, or of a job that torchrun has started again."""
    if options.resume is not None or (was_restarted() and newest_checkpoint(folder)):
        return read_state(folder)
    if options.overwrite or was_restarted():
        return None, None
    refuse_to_replace(folder)
    return None, None


def _start(options: argparse.Namespace, folder: Path, layout: Layout) -> int:
    if not start_ranks(options.arguments, layout.ranks):
        return 0
    try:
        _, state = read_state(folder)
    except TrainError:  # it was before the first step
        print("Stopped.")
        return 130
    return 130 if state["step"] < state["settings"]["steps"] else 0


def _run_rank(options, settings, layout, corpus, folder, data, checkpoint, state) -> int:
    choose_threads(settings.threads)
    join_group(layout.backend, layout.ranks)
    leads = distributed.get_rank() == 0
    console = Console(file=None if leads else open(os.devnull, "w"))  # noqa: SIM115 (until the process ends)
    run = None
    try:
        if leads and state is None:
            remove_checkpoints(folder)
        distributed.barrier()
        run = MeshRun(settings, layout, corpus, folder, data, options.save_every)
        if checkpoint is not None:
            run.resume(checkpoint, state)
            console.print(f"Continuing after step {run.step}", highlight=False)
        with MeshProgress(run, console) as progress:
            run.train(progress.update)
        results = run.results()
        if leads:
            write_json(folder / "results.json", results)
            if options.json:
                write_json(Path(options.json), results)
            progress.summarise(results)
        distributed.barrier()
    except Interrupted:
        console.print(
            f"Stopped after step {run.step} of {run.settings.steps}, and saved.\n"
            f"To continue: torch-sluice train --resume {shlex.quote(str(folder))}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    except (TrainError, distributed.DistError) as error:
        if leads and isinstance(error, TrainError):
            raise
        print(f"rank {distributed.get_rank()}: {error}", file=sys.stderr)
        return 2
    finally:
        if run is not None:
            run.close()
    distributed.destroy_process_group()
    return 0
