"""Runs the main job for some steps: on one rank by its own loop, and on a mesh; what tests of meshes compare."""

import dataclasses

import torch

from support import rank_pool
from torch_sluice.accumulate.policy import make_policy
from torch_sluice.train.data import load_corpus
from torch_sluice.train.mesh.layout import Layout, check_fit
from torch_sluice.train.mesh.stage import Position
from torch_sluice.train.settings import PRESETS
from torch_sluice.train.side import Side
from torch_sluice.train.sluice import SluiceSide

rank_pool.preload("torch_sluice.train.mesh.side", "transformers.models.llama.modeling_llama")

SETTINGS = dataclasses.replace(
    PRESETS["demo"], steps=30, context=40, micro_batches=4, micro_size=1, layers=2, width=16, heads=4, feedforward=24,
    local_window=4, target_density=0.4, warmup=5, gate_learning_rate=0.1,
)  # fmt: skip
DEEP = dataclasses.replace(SETTINGS, layers=4)  # for four stages
FEW = dataclasses.replace(SETTINGS, micro_batches=2)  # for tensor parallel, where each rank computes on all of them
SHORT = dataclasses.replace(SETTINGS, steps=8)
WIDE = dataclasses.replace(DEEP, steps=5, micro_batches=8)  # for 8 ranks, and for two pipelines of four stages


def write_text(folder):
    """Ten small files of text that can be learned a little."""
    for number in range(10):
        lines = (f"def function_{number}_{i}(x):\n    return x + {i}\n" for i in range(30))
        (folder / f"module_{number}.py").write_text("".join(lines))
    return str(folder)


def train_one_rank(folder, settings, dense):
    """Losses and densities of the main job's own side, which knows nothing of meshes."""
    before = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    try:
        return _train_one_rank(settings, dense, load_corpus(folder, settings.context))
    finally:
        torch.set_default_dtype(before[0])
        torch.set_num_threads(before[1])


def _train_one_rank(settings, dense, corpus):
    side = (Side if dense else SluiceSide)(settings)
    if not dense:
        side.session.policy = make_policy("fp32", 0.0, settings.micro_batches)
    position, micro = Position(settings.seed), iter(())
    side.model.register_forward_pre_hook(lambda *_: numbers.append(next(micro)))
    numbers = []
    for index, layer in enumerate(side.model.model.layers):
        layer.register_forward_pre_hook(lambda *_, index=index: position.reseed(numbers[-1], index))
    for step in range(settings.steps):
        position.step, micro = step, iter(range(settings.micro_batches))
        batches = [
            corpus.batch(settings.seed, step, m, settings.micro_size, settings.context)
            for m in range(settings.micro_batches)
        ]
        side.train_step(batches, step)
    side.close()
    return side.history.loss, side.history.density


def train_on_mesh(folder, settings, options, last=None, load=None, save=None):
    """Losses and densities of a mesh, the same on each rank; run it on every rank.

    Args:
        options: of ``Layout``.
        last: step before which to stop; default: the last one.
        load, save: folders of a run, to go on from its checkpoint, and to leave one there at the end.
    """
    from torch_sluice.train.mesh.checkpoint import load_checkpoint, read_state, save_checkpoint
    from torch_sluice.train.mesh.side import MeshSide

    layout = Layout(**options)
    check_fit(settings, layout)
    torch.set_default_dtype(torch.float64)
    try:
        side, losses, densities, done = MeshSide(settings, layout, policy="fp32"), [], [], 0
        corpus, first = load_corpus(folder, settings.context), side.position.first_micro
        if load is not None:
            path, state = read_state(load)
            load_checkpoint(path, side, state)
            done = state["step"]
        for step in range(done, last or settings.steps):
            batches = [
                corpus.batch(settings.seed, step, first + m, settings.micro_size, settings.context)
                for m in range(side.micro_batches)
            ]
            losses.append(side.train_step(batches, step)[0])
            densities.append(side.density)
        if save is not None:
            own = {"step": done + len(losses), "settings": settings.to_dict(), "layout": layout.to_dict()}
            save_checkpoint(save, side, {**own, "data": folder, "fingerprint": corpus.fingerprint})
        side.close()
        return losses, densities
    finally:
        torch.set_default_dtype(torch.float32)
