"""What a run is made of, and the two presets."""

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
        for name in ("steps", "context", "micro_batches", "micro_size", "layers", "width", "heads"):
            if getattr(self, name) < 1:
                raise TrainError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 1")
        if self.context < 32:
            raise TrainError(f"--context is {self.context}, expected at least 32 bytes")
        if self.width % self.heads or self.width // self.heads % 2:
            raise TrainError(f"--width is {self.width}, expected an even multiple of --heads = {self.heads}")
        if not 0 < self.target_density <= 1:
            raise TrainError(f"--target-density is {self.target_density}, expected a number in (0, 1]")
        for name in ("learning_rate", "gate_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise TrainError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected a positive number")
        for name in ("local_window", "seed"):
            if getattr(self, name) < 0:
                raise TrainError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected at least 0")
        floor = window_density(self.context, self.local_window, self.sinks)
        if self.target_density < floor:
            raise TrainError(
                f"--target-density is {self.target_density}, but the {self.local_window} keys of --local-window and "
                f"the {self.sinks} sinks alone keep {floor:.3f} of the pairs: raise the one or lower the other"
            )
        if self.threads < 0:
            raise TrainError(f"--threads is {self.threads}, expected at least 1 (0: as torch decides)")


def window_density(context: int, window: int, sinks: int) -> float:
    """Share of the causal pairs that the nearest ``window`` keys and the first ``sinks`` keys make."""
    # Row i has i keys: the window's, and of those before it the sinks.
    kept = sum(min(i, window) + min(sinks, max(i - window, 0)) for i in range(1, context + 1))
    return kept / (context * (context + 1) / 2)


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
