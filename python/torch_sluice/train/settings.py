"""What a run is made of, and the two presets."""

import os
from dataclasses import asdict, dataclass, fields, replace

from torch_sluice.train.errors import TrainError


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, so that a checkpoint can continue it.

    A step is ``micro_batches`` micro-batches of ``micro_size`` sequences of ``context`` bytes, then one optimizer step.
    """

    preset: str
    steps: int
    context: int
    micro_batches: int
    micro_size: int
    layers: int
    width: int
    heads: int
    feedforward: int
    learning_rate: float
    gate_learning_rate: float
    warmup: int
    target_density: float
    local_window: int  # keys at this distance or nearer are kept whatever the gate says
    sinks: int
    evaluate_every: int
    heldout_windows: int  # sequences of the final evaluation
    quick_windows: int  # sequences of the evaluations on the way
    seed: int = 0
    threads: int = 0  # 0: as many as torch takes by itself
    with_window: bool = False
    weight_decay: float = 0.1
    clip: float = 1.0

    @property
    def tokens_per_step(self) -> int:
        return self.micro_batches * self.micro_size * self.context

    def to_dict(self) -> dict:
        return asdict(self)

    @staticmethod
    def from_dict(values: dict) -> "Settings":
        known = {f.name for f in fields(Settings)}
        if set(values) != known:
            raise TrainError("the checkpoint's settings are not those of this version of torch-sluice; train anew")
        return Settings(**values)

    def override(self, **values) -> "Settings":
        """A copy with those that are not None, checked."""
        settings = replace(self, **{name: value for name, value in values.items() if value is not None})
        settings.check()
        return settings

    def check(self) -> None:
        """Raises TrainError for what no machine can train; ``check_memory`` looks at this one."""
        for name, (least, most, unit) in _BOUNDS.items():
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if value < least:
                raise TrainError(f"{option} is {value}, expected at least {least}{unit}")
            if value > most:
                raise TrainError(f"{option} is {value}, expected at most {most}{unit}")
        if self.width % self.heads or self.width // self.heads % 2:
            raise TrainError(f"--width is {self.width}, expected an even multiple of --heads = {self.heads}")
        if self.width // self.heads > _MOST_HEAD_DIM:
            raise TrainError(
                f"--width is {self.width}, expected at most {_MOST_HEAD_DIM} for each of --heads = {self.heads}"
            )
        if not 0 < self.target_density <= 1:
            raise TrainError(f"--target-density is {self.target_density}, expected a number in (0, 1]")
        for name in ("learning_rate", "gate_learning_rate"):
            if not 0 < getattr(self, name) <= _MOST_LEARNING_RATE:
                raise TrainError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, expected a positive number of at most "
                    f"{_MOST_LEARNING_RATE:g}"
                )
        floor = window_density(self.context, self.local_window, self.sinks)
        if self.target_density < floor:
            raise TrainError(
                f"--target-density is {self.target_density}, but the {self.local_window} keys of --local-window and "
                f"the {self.sinks} sinks alone keep {floor:.3f} of the pairs: raise the one or lower the other"
            )
        if self.threads < 0:
            raise TrainError(f"--threads is {self.threads}, expected at least 1 (0: as torch decides)")
        if self.threads > most_threads():
            raise TrainError(
                f"--threads is {self.threads}, expected at most {most_threads()}; this machine has {os.cpu_count()} "
                "processors"
            )

    @property
    def least_bytes(self) -> int:
        """Memory that a comparison in one process needs at least; what it takes is more."""
        parameters = self.layers * (4 * self.width**2 + 3 * self.width * self.feedforward) + 256 * self.width
        sides = 3 if self.with_window else 2
        tokens = self.micro_size * self.context
        # Of each token, for the backward pass: the logits, and in each layer what enters its linear maps.
        activations = tokens * (2 * 256 + self.layers * (6 * self.width + 3 * self.feedforward))
        batches = 2 * self.micro_batches * tokens  # int64
        return 4 * (sides * 4 * parameters + activations + batches)  # weights, gradients and two moments of each side

    def check_memory(self) -> None:
        """Raises TrainError where this machine has less than ``least_bytes``."""
        present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if self.least_bytes > present:
            names = ("context", "micro_size", "micro_batches", "layers", "width")
            options = ", ".join(f"--{name.replace('_', '-')} is {getattr(self, name)}" for name in names)
            raise TrainError(
                f"{options}: that needs at least {self.least_bytes / 2**30:.1f} GiB of memory, expected at most the "
                f"{present / 2**30:.1f} GiB of this machine"
            )


# (least, most, unit). The greatest are beyond what trains on a CPU; greater ones only fail late, or overflow.
_BOUNDS = {
    "steps": (1, 10**9, ""),
    "context": (32, 2**20, " bytes"),
    "micro_batches": (1, 2**16, ""),
    "micro_size": (1, 2**16, ""),
    "layers": (1, 1024, ""),
    "width": (1, 2**16, ""),
    "heads": (1, 2**12, ""),
    "local_window": (0, 2**20, ""),
    "seed": (0, 2**64 - 1, ""),  # what torch.manual_seed takes
}
_MOST_HEAD_DIM = 256  # SL_ATTENTION_MAX_HEAD_DIM of ops/sluice/gated_attention.h
_MOST_LEARNING_RATE = 1e3  # AdamW moves a weight by as much in a step; float32 overflows not far above


def most_threads() -> int:
    """More than help anywhere; torch ends the process where the system refuses it a thread."""
    return max(64, 4 * (os.cpu_count() or 1))


def window_density(context: int, window: int, sinks: int) -> float:
    """Share of the causal pairs that the nearest ``window`` keys and the first ``sinks`` keys make."""
    # Row i has i keys: the window's, and of those before it the sinks.
    kept = _sum_of_minima(context, window) + _sum_of_minima(max(context - window, 0), sinks)
    return kept / (context * (context + 1) / 2)


def _sum_of_minima(rows: int, most: int) -> int:
    """The sum of min(i, most) over i = 1 to rows."""
    rising = min(rows, most)
    return rising * (rising + 1) // 2 + (rows - rising) * most


PRESETS = {
    # What the product is for: a context at which attention is most of the work, and minutes on two cores.
    "demo": Settings(
        preset="demo",
        steps=200,
        context=2048,
        micro_batches=2,
        micro_size=1,
        layers=4,
        width=128,
        heads=4,
        feedforward=384,
        learning_rate=3e-3,
        gate_learning_rate=3e-3,
        warmup=20,
        target_density=0.2,
        local_window=64,
        sinks=4,
        evaluate_every=20,
        heldout_windows=48,
        quick_windows=6,
    ),
    # An hour on two cores.
    "long": Settings(
        preset="long",
        steps=380,
        context=4096,
        micro_batches=2,
        micro_size=1,
        layers=4,
        width=192,
        heads=6,
        feedforward=512,
        learning_rate=3e-3,
        gate_learning_rate=3e-3,
        warmup=40,
        target_density=0.2,
        local_window=64,
        sinks=4,
        evaluate_every=38,
        heldout_windows=48,
        quick_windows=6,
    ),
}
