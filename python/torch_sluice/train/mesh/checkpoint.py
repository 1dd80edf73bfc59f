"""Checkpoints of a run on a mesh, by torch.distributed.checkpoint: written under one mesh, read under any other.

A checkpoint is a folder ``checkpoints/step-NNNNNNNN``: the tensors of the whole model and its optimizer, divided into
files by who wrote them; each rank's ``accumulators-RANK.pt``, of use to the same mesh alone; and ``run.json`` with the
settings and the checksums of the other files. It gets its name when it is complete.
"""

import hashlib
import json
import shutil
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import checkpoint as tensors_of_ranks

from torch_sluice.train.checkpoint import MESH_FOLDER, NAME, write_tensors
from torch_sluice.train.errors import TrainError
from torch_sluice.train.mesh.layout import Layout
from torch_sluice.train.mesh.side import MeshSide
from torch_sluice.train.settings import Settings

_FORMAT = "torch-sluice train --mesh, version 1"
_RUN = "run.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")  # what AdamW keeps for each parameter, beside the number of its steps


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint of the run in ``folder``, None where there is none."""
    return max((path for path in (folder / MESH_FOLDER).glob("step-*") if not path.suffix), default=None)


def remove_checkpoints(folder: Path) -> None:
    """Those of the run in ``folder`` that a new one replaces, on a mesh or not."""
    shutil.rmtree(folder / MESH_FOLDER, ignore_errors=True)
    (folder / NAME).unlink(missing_ok=True)


def save_checkpoint(folder: Path, side: MeshSide, state: dict) -> None:
    """Writes the side and the plain values of ``state``, among them ``step``; all ranks call this.

    Raises:
        TrainError: on all ranks, if any of them can't write.
    """
    rank = distributed.get_rank()
    path = folder / MESH_FOLDER / f"step-{state['step']:08d}"
    unfinished = path.with_suffix(".unfinished")
    _on_rank_0(lambda: _clear(unfinished))
    try:
        tensors_of_ranks.save(_tensors(side), checkpoint_id=unfinished)
    except tensors_of_ranks.CheckpointException as error:
        raise TrainError(f"cannot write the checkpoint {path}: {_cause(error)}") from error
    problem = None
    if side.session is not None:
        try:
            with (unfinished / f"accumulators-{rank}.pt").open("wb") as file:
                write_tensors(side.session.state_dict(), file)
        except OSError as error:
            problem = f"cannot write the checkpoint {path}: {error.strerror or error}"
    _agree(problem)
    controller = None if side.controller is None else side.controller.state_dict()
    _on_rank_0(lambda: _finish(unfinished, path, {"format": _FORMAT, "controller": controller, **state}))


def read_state(folder: Path) -> tuple[Path, dict]:
    """The newest checkpoint of a run and its plain values; no other rank is needed.

    Raises:
        TrainError: there is none, or ``run.json`` is not what ``save_checkpoint`` writes.
    """
    path = newest_checkpoint(folder)
    if path is None:
        raise TrainError(f"--resume is '{folder}', which holds no checkpoint; give the --out folder of an earlier run")
    try:
        state = json.loads((path / _RUN).read_text())
        if state["format"] != _FORMAT:
            raise ValueError(f"its format is {state['format']!r}, expected {_FORMAT!r}")
        Settings.from_dict(state["settings"])
        Layout.from_dict(state["layout"])
        state["step"], state["data"], state["fingerprint"], state["controller"], state["sums"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, f"{_RUN}: {error}") from error
    return path, state


def load_checkpoint(path: Path, side: MeshSide, state: dict) -> None:
    """Brings the side to where it was when ``path`` was saved, under whatever mesh that was; all ranks call this.

    Raises:
        TrainError: on all ranks, if a file is missing, damaged, or does not fit the model.
    """
    _on_rank_0(lambda: _check_sums(path, state))
    for entry in side.parameters:
        if entry.parameter not in side.optimizer.state:
            moments = {name: torch.zeros_like(entry.parameter.detach()) for name in _MOMENTS}
            side.optimizer.state[entry.parameter] = {"step": torch.zeros(()), **moments}
    tensors = _tensors(side)
    try:
        tensors_of_ranks.load(tensors, checkpoint_id=path)
    except (tensors_of_ranks.CheckpointException, ValueError, RuntimeError) as error:
        raise _damaged(path, _cause(error)) from error
    _copy_twins(side)
    if side.controller is not None:
        side.controller.load_state_dict(state["controller"])
    accumulators = path / f"accumulators-{distributed.get_rank()}.pt"
    problem = None
    if side.session is not None and Layout.from_dict(state["layout"]) == side.layout:
        try:
            side.session.load_state_dict(torch.load(accumulators, weights_only=True))
        except Exception as error:  # torch raises a dozen kinds for a file that is not what it should be
            problem = str(_damaged(path, f"{accumulators.name}: {error}"))
    _agree(problem)


def _tensors(side: MeshSide) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state by their names in the whole model, in the memory of this rank's parts."""
    tensors = {}
    for entry in side.parameters:
        tensors[f"model.{entry.name}"] = entry.whole(entry.parameter.detach())
        kept = side.optimizer.state.get(entry.parameter)
        if kept:
            tensors[f"optimizer.{entry.name}.step"] = kept["step"]
            for name in _MOMENTS:
                tensors[f"optimizer.{entry.name}.{name}"] = entry.whole(kept[name])
    return tensors


@torch.no_grad()
def _copy_twins(side: MeshSide) -> None:
    """A rank with the first stage and the last has the tied weight twice, of which one was loaded."""
    loaded = {entry.name: entry for entry in side.parameters}  # the last of a name, as in _tensors
    for entry in side.parameters:
        source = loaded[entry.name]
        if source is not entry:
            entry.parameter.copy_(source.parameter)
            for name, tensor in side.optimizer.state[source.parameter].items():
                side.optimizer.state[entry.parameter][name].copy_(tensor)


def _clear(unfinished: Path) -> None:
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)


def _finish(unfinished: Path, path: Path, state: dict) -> None:
    sums = {file.name: _digest(file) for file in sorted(unfinished.iterdir())}
    (unfinished / _RUN).write_text(json.dumps({**state, "sums": sums}, indent=1))
    shutil.rmtree(path, ignore_errors=True)
    unfinished.rename(path)
    for other in path.parent.iterdir():
        if other != path and other.name.startswith("step-"):
            shutil.rmtree(other)


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _check_sums(path: Path, state: dict) -> None:
    for name, expected in state["sums"].items():
        if not (path / name).is_file():
            raise _damaged(path, f"{name} is missing")
        if _digest(path / name) != expected:
            raise _damaged(path, f"{name} is not what was written")


def _damaged(path: Path, problem: object) -> TrainError:
    return TrainError(f"the checkpoint {path} is damaged or is not one ({problem}); train anew with another --out")


def _cause(error: Exception) -> str:
    """The first failure that the ranks had, without tracebacks."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    return str(first).splitlines()[0] if str(first) else type(first).__name__


def _on_rank_0(action) -> None:
    """Runs it on rank 0; raises TrainError on all ranks if it fails."""
    problem = None
    if distributed.get_rank() == 0:
        try:
            action()
        except (OSError, TrainError) as error:
            problem = str(error)
    _agree(problem)


def _agree(problem: str | None) -> None:
    """Raises the first problem that any rank has on all of them."""
    problems = [None] * distributed.get_world_size()
    distributed.all_gather_object(problems, problem)
    for text in problems:
        if text is not None:
            raise TrainError(text)
