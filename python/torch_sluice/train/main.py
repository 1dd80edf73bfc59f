"""The main job from end to end: text, training, comparison, report."""

import contextlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from rich.console import Console

from torch_sluice.train.checkpoint import MESH_FOLDER, load_checkpoint, peek_steps
from torch_sluice.train.compare import compare
from torch_sluice.train.data import load_corpus
from torch_sluice.train.errors import TrainError
from torch_sluice.train.folder import FolderLock, make_folder
from torch_sluice.train.loop import STEPS_NAME, Interrupted, Run, set_threads
from torch_sluice.train.progress import TrainProgress
from torch_sluice.train.settings import Settings


def start_run(settings: Settings, data: str | None, folder: Path, overwrite: bool) -> Run:
    """A new run whose files go to ``folder``, which is made if need be."""
    settings.check_memory()
    corpus = load_corpus(data, settings.context, folder)
    make_folder(folder)
    with _release_on_failure(FolderLock(folder)) as lock:
        if not overwrite:
            refuse_to_replace(folder)
        shutil.rmtree(folder / MESH_FOLDER, ignore_errors=True)  # of the run that this one replaces
        with contextlib.suppress(OSError):
            (folder / STEPS_NAME).unlink()
        data = None if data is None else str(Path(data).resolve())
        return Run(settings, corpus, folder, data, lock)


@contextlib.contextmanager
def _release_on_failure(lock: FolderLock):
    try:
        yield lock
    except BaseException:
        lock.close()
        raise


def refuse_to_replace(folder: Path) -> None:
    """A finished run may be replaced; one that is unfinished, damaged or somebody else's is not ours to lose."""
    try:
        done = peek_steps(folder)
    except TrainError as error:
        raise TrainError(f"{error}, or add --overwrite") from error
    if done is not None and done[0] < done[1]:
        raise TrainError(
            f"--out is '{folder}', which holds an unfinished run (step {done[0]} of {done[1]}): continue it with "
            f"'torch-sluice train --resume {folder}', or add --overwrite, or choose another --out"
        )


def resume_run(folder: Path, threads: int | None) -> Run:
    """The run that was saved in ``folder``, exactly where it stopped."""
    if not folder.is_dir():
        load_checkpoint(folder)  # says that there is none
    with _release_on_failure(FolderLock(folder, "--resume")) as lock:
        return _read_run(folder, threads, lock)


def _read_run(folder: Path, threads: int | None, lock: FolderLock) -> Run:
    state = load_checkpoint(folder)
    try:
        settings = Settings.from_dict(state["settings"]).override(threads=threads)
        settings.check_memory()
        corpus = load_corpus(state["data"], settings.context, folder)
    except KeyError as error:
        raise TrainError(f"the checkpoint in '{folder}' lacks {error}; train anew") from error
    except TypeError as error:
        raise TrainError(f"the checkpoint in '{folder}' holds a value of a wrong type ({error}); train anew") from error
    make_folder(folder)
    run = Run(settings, corpus, folder, state["data"], lock)
    try:
        run.load_state_dict(state)
    except BaseException:
        run.close()
        raise
    return run


def execute_run(run: Run, console: Console, json_path: Path | None, **outputs) -> dict:
    """Trains what is left, compares, writes results.json into the run's folder and to ``json_path``. The caller closes
    the run.

    Args:
        outputs: ``tensorboard``, ``metrics_port`` and ``metrics_host`` of ``Run.watch``.

    Raises:
        Interrupted: the user asked to stop; everything needed to resume has been saved.
    """
    result = _train_and_compare(run, console, json_path, outputs)
    write_json(run.folder / "results.json", result)
    if json_path is not None:
        write_json(json_path, result)
    return result


def _train_and_compare(run: Run, console: Console, json_path: Path | None, outputs: dict) -> dict:
    if json_path is not None:
        check_writable(json_path)
    threads = set_threads(run.settings)
    run.watch(**outputs)
    settings, corpus = run.settings, run.corpus
    passed_over = (
        f", {corpus.skipped_files} files passed over (empty, not UTF-8, or copies)" if corpus.skipped_files else ""
    )
    console.print(
        f"Text: {corpus.name}: {len(corpus.train) / 1e6:.1f} MB to train on, {len(corpus.heldout) / 1e6:.1f} MB held "
        f"out{passed_over}\n"
        f"Model: {settings.layers} layers, width {settings.width}, {settings.heads} heads, context {settings.context}; "
        f"{settings.steps} steps of {settings.tokens_per_step} bytes; {threads} threads\n"
        f"Sides: {', '.join(side.title for side in run.sides.values())}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if outputs.get("metrics_port") is not None:
        host, port = outputs.get("metrics_host") or "127.0.0.1", next(iter(run.sides.values())).monitor.metrics_port
        console.print(f"Metrics: http://{host}:{port}/metrics", highlight=False, markup=False, soft_wrap=True)
    if run.step:
        console.print(f"Continuing after step {run.step}", highlight=False)
    with TrainProgress(run, console) as progress:
        run.train(progress.update)
    with console.status("comparing") as status:
        return compare(run, lambda text: status.update(text))


def write_report(result: dict, folder: Path) -> Path:
    from torch_sluice.report import render_html

    path = folder / "report.html"
    try:
        page = render_html(result)
    except ImportError as error:
        raise TrainError(f"no HTML report: {error}; pip install 'torch-sluice[train]'") from error
    _write_whole(path, page)
    return path


def write_json(path: Path, result: dict) -> None:
    _write_whole(path, json.dumps(result, indent=1, allow_nan=False) + "\n")


def _write_whole(path: Path, text: str) -> None:
    """Through a file beside it, so that a crash never leaves half of it."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, path)
    except OSError as error:
        raise TrainError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()


def check_writable(path: Path) -> None:
    """Before an hour of training, not after it."""
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise TrainError(f"--json is '{path}', which cannot be written: {error.strerror or error}") from error


__all__ = ["Interrupted", "execute_run", "resume_run", "start_run", "write_report"]
