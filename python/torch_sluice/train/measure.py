"""Memory, FLOPs and time by part of a training step, measured in a process of its own.

``python -m torch_sluice.train.measure FOLDER SIDE`` builds one side, restores its trained state and takes a few steps.

Memory is how much the process grew, at most, from before the model was built. The C allocator is told to give freed
blocks back at once, so that the figure is what was needed at one time and not what the allocator kept.
"""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

_PARTS = ("attention", "linear layers", "accumulation and optimizer", "the rest")


def measure_side(folder: Path, side: str) -> dict:
    """Figures of the named side of the finished run in ``folder``.

    Returns:
        ``peak_bytes``, ``flops_per_step`` and ``time_by_part`` (shares of a step that add up to 1); if the measuring
        process failed, ``problem`` alone: the last that it said.
    """
    environment = dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="0", MALLOC_TOP_PAD_="0")
    command = [sys.executable, "-m", "torch_sluice.train.measure", str(folder), side]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        last_words = result.stderr.strip().splitlines()[-1:]
        return {"problem": last_words[0] if last_words else f"the measuring process ended with {result.returncode}"}
    return json.loads(result.stdout.splitlines()[-1])


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


def _time_by_part(step) -> dict[str, float]:
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
    total = sum(times.values())
    return {part: max(times[part], 0.0) / total for part in _PARTS}


def _main(folder: str, side_name: str) -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401  (lazily imported code is not the model's memory)

    from torch_sluice.monitor import count_flops
    from torch_sluice.train.checkpoint import load_checkpoint
    from torch_sluice.train.loop import SIDES, set_threads
    from torch_sluice.train.settings import Settings

    state = load_checkpoint(Path(folder))
    settings = Settings.from_dict(state["settings"])
    set_threads(settings)
    side_state = state["sides"][side_name]
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # the thread pool and the BLAS buffers
    shape = (settings.micro_size, settings.context + 1)
    batches = [torch.randint(0, 256, shape) for _ in range(settings.micro_batches)]
    before = _status_bytes("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts anew
    side = SIDES[side_name](settings)
    side.load_state_dict(side_state)

    def step():
        side.train_step(batches, settings.steps - 1)

    for _ in range(2):
        step()
    figures = {"peak_bytes": _status_bytes("VmHWM") - before, "time_by_part": _time_by_part(step)}
    figures["flops_per_step"] = count_flops(step)
    print(json.dumps(figures))


if __name__ == "__main__":
    _main(*sys.argv[1:])
