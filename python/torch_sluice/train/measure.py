"""Memory, FLOPs and time by part of a training step, measured in a process of its own on batches of the run.

``python -m torch_sluice.train.measure FOLDER SIDE FIRST`` builds one side, restores its trained state and takes steps
on batches that the run had from step FIRST on. How many pairs a gate keeps depends on the text, and on that every
figure.

Memory is how much the process grew, at most, from before the model was built. The C allocator is told to give freed
blocks back at once, so that the figure is what was needed at one time and not what the allocator kept.
"""

import copy
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

MEASURED_STEPS = 12  # of each figure but the memory; one alone varies by a factor of two on a machine that is not quiet
_PARTS = ("attention", "linear layers", "accumulation and optimizer", "the rest")


def measure_side(folder: Path, side: str, first: int) -> dict:
    """Figures of the named side of the finished run in ``folder``, of steps from the one with index ``first`` on.

    Returns:
        ``peak_bytes``, ``flops_per_step`` (mean of ``measured_steps`` steps), ``time_by_part`` (shares of a step that
        add up to 1: medians of as many profiled steps) and ``time_by_part_range`` (least and greatest share of each);
        if the measuring process failed, ``problem`` alone: the last that it said.
    """
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_TOP_PAD_="0")
    command = [sys.executable, "-m", "torch_sluice.train.measure", str(folder), side, str(first)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        last_words = result.stderr.strip().splitlines()[-1:]
        return {"problem": last_words[0] if last_words else f"the measuring process ended with {result.returncode}"}
    return json.loads(result.stdout.splitlines()[-1])


def steps_to_measure(first: int, steps: int) -> list[int]:
    """``MEASURED_STEPS`` indices spread evenly from ``first`` to the last of ``steps``; some twice if need be."""
    last = steps - 1
    return [first + round(i * (last - first) / (MEASURED_STEPS - 1)) for i in range(MEASURED_STEPS)]


def _status_bytes(name: str) -> int:
    """VmRSS (now) or VmHWM (the most since the last reset) of this process."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024


def _part_of(operator: str) -> str:
    """Which part of a step the self time of an operator belongs to."""
    if "scaled_dot_product" in operator or "gated_attention" in operator:
        return "attention"
    if operator in ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"):
        return "linear layers"
    if (
        operator.startswith(("sluice::", "aten::_foreach", "aten::_fused", "Optimizer."))
        or "AccumulateGrad" in operator
    ):
        return "accumulation and optimizer"
    return "the rest"


def _shares_of_step(step: Callable[[], None]) -> dict[str, float]:
    import torch

    with torch.profiler.profile() as profile:
        step()
    times = defaultdict(float)
    for event in profile.key_averages():
        times[_part_of(event.key)] += event.self_cpu_time_total
        if event.key.startswith("Optimizer."):  # the elementwise operators within it are its own
            inside = event.cpu_time_total - event.self_cpu_time_total
            times["accumulation and optimizer"] += inside
            times["the rest"] -= inside
    times = {part: max(times[part], 0.0) for part in _PARTS}
    total = sum(times.values())
    return {part: time / total for part, time in times.items()}


def summarise_shares(shares: list[dict[str, float]]) -> dict:
    """``time_by_part`` and ``time_by_part_range`` of the shares of several steps."""
    medians = {part: statistics.median(step[part] for step in shares) for part in shares[0]}
    total = sum(medians.values())  # medians of shares need not add up to 1
    return {
        "time_by_part": {part: share / total for part, share in medians.items()},
        "time_by_part_range": {
            part: [min(step[part] for step in shares), max(step[part] for step in shares)] for part in shares[0]
        },
    }


def _main(folder: str, side_name: str, first: str) -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  (lazily imported code is not the model's memory)

    from torch_sluice.monitor import count_flops
    from torch_sluice.train.checkpoint import load_checkpoint
    from torch_sluice.train.data import load_corpus
    from torch_sluice.train.loop import SIDES, set_threads
    from torch_sluice.train.settings import Settings

    state = load_checkpoint(Path(folder))
    settings = Settings.from_dict(state["settings"])
    set_threads(settings)
    corpus = load_corpus(state["data"], settings.context, Path(folder))
    corpus.check_fingerprint(state["fingerprint"])
    batches = [corpus.step_batches(settings, number) for number in steps_to_measure(int(first), settings.steps)]
    side_state = state["sides"][side_name]
    del state, corpus
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # the thread pool and the BLAS buffers
    before = _status_bytes("VmRSS")
    side = SIDES[side_name](settings)

    def restore():
        side.load_state_dict(copy.deepcopy(side_state))  # the optimizer goes on in the tensors that it is given

    def step(index: int):
        side.train_step(batches[index], settings.steps - 1)  # its learning rate: the state is that of the end

    restore()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    for index in range(2):
        step(index)
    figures = {"peak_bytes": _status_bytes("VmHWM") - before, "measured_steps": len(batches)}
    restore()
    flops = [count_flops(lambda index=index: step(index)) for index in range(len(batches))]
    figures["flops_per_step"] = statistics.fmean(flops)
    restore()
    _shares_of_step(lambda: step(0))  # the profiler is slow at its first use
    shares = [_shares_of_step(lambda index=index: step(index)) for index in range(len(batches))]
    figures.update(summarise_shares(shares))
    print(json.dumps(figures))


if __name__ == "__main__":
    _main(*sys.argv[1:])
