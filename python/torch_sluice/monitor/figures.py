"""The figures of a run: what a monitor adds up, and what follows from it. Nothing here writes, warns or watches."""

import contextlib
import math

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from torch_sluice.monitor.flops import FlopCount
from torch_sluice.monitor.memory import MemoryMeter
from torch_sluice.monitor.numbers import as_text, short
from torch_sluice.monitor.peak import is_peak_known, peak_flops_of
from torch_sluice.monitor.records import Curve, MovingAverage, Occupation, StepTimes
from torch_sluice.monitor.samples import ModelSampler
from torch_sluice.parallel.statistics import CommunicationStatistics, communication_statistics

_CURVES = frozenset({"seconds", "loss", "mfu", "mfu_dense_equivalent", "density", "overlapped_share"})


class Figures:
    """Steps, times, operations, memory and communication of a model's run; :class:`Monitor` feeds it."""

    def __init__(self, model: nn.Module, name: str | None, peak_flops: float | None, target_loss: float | None):
        self.name = default_name(model) if name is None else as_text(name)
        self.model, self.target_loss = model, None if target_loss is None else float(target_loss)
        self._parameter_bytes = 0
        self._peak_flops = None if peak_flops is None else float(peak_flops)
        self.steps = self.tokens = self.odd_losses = 0
        self.total_seconds = 0.0
        self.times = StepTimes()
        self.curves: dict[str, Curve] = {}
        self.latest: dict[str, float] = {}
        self.flops: FlopCount | None = None
        self.density: float | None = None
        self.half_share: float | None = None
        self.loss = MovingAverage()
        self.steps_to_target: int | None = None
        self.seconds_to_target: float | None = None
        self.communication = CommunicationStatistics()
        self._communication_before = communication_statistics()
        self._sampler = ModelSampler(model)
        self._occupation = Occupation()  # by the steps that the monitor times itself
        self._begin_metering()

    def _begin_metering(self) -> None:
        self.device = self._find_device()
        self._meter = MemoryMeter(self.device)
        self._bytes_before = self.parameter_bytes

    def _find_device(self) -> torch.device:
        return next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))

    # ---- what is added

    def add_step(self, seconds: float, tokens: int, timed: bool) -> None:
        """Counts a step; ``timed``: its seconds are those of a usual one."""
        self.steps += 1
        self.tokens += tokens
        self.total_seconds += seconds
        if timed:
            self.times.add(seconds)

    def add_loss(self, loss: float) -> None:
        """Goes on with the smoothed loss, and notes when it reaches the target."""
        self.odd_losses += not math.isfinite(loss)
        smoothed = self.loss.add(loss)
        reached = self.target_loss is not None and smoothed is not None and smoothed <= self.target_loss
        if reached and self.steps_to_target is None:
            self.steps_to_target, self.seconds_to_target = self.steps, self.total_seconds

    def add_figures(self, figures: dict[str, float], timed: bool) -> None:
        """Keeps the figures of a step as the latest, and in the curves."""
        for name, value in figures.items():
            shown = name in _CURVES or name.startswith("bits_")
            if shown and (timed or name != "seconds") and math.isfinite(value):
                self.curves.setdefault(name, Curve()).add(self.steps, value)
        self.density = figures.get("density", self.density)
        self.half_share = figures.get("half_share", self.half_share)
        self.latest = figures

    def take_communication(self) -> dict[str, float]:
        """Adds what was communicated since the last call. Returns it as figures; none in a job without groups."""
        now = communication_statistics()
        if now is self._communication_before:  # this process has made no group
            return {}
        step = now - self._communication_before
        self._communication_before = now
        if not step.collectives and not step.sends:
            return {}
        self.communication = self.communication + step
        figures = {"communication_bytes": step.bytes + step.sent_bytes}
        return figures if step.overlapped_share is None else {**figures, "overlapped_share": step.overlapped_share}

    # ---- what follows

    def use_of_machine(self, seconds: float) -> dict[str, float]:
        """Operations and MFU of a step of so many seconds; nothing where an operator could not be counted."""
        count = self.flops.at_density(self.density)
        if count.unknown:
            return {}
        full = sum(flops / self.peak_of(dtype) for dtype, flops in count.by_dtype.items())  # seconds at the peaks
        mfu = full / seconds
        dense = count.dense_equivalent / count.executed if count.executed else 1.0
        return {
            "flops": count.executed,
            "flops_dense_equivalent": count.dense_equivalent,
            "mfu": mfu,
            "mfu_dense_equivalent": mfu * dense,
        }

    def peak_of(self, dtype: str | torch.dtype) -> float:
        """FLOP/s that count as full use in this dtype."""
        if self._peak_flops is not None:
            return self._peak_flops
        return peak_flops_of(_as_dtype(dtype), self.device)

    @property
    def peak_flops(self) -> float:
        """FLOP/s that count as full use in the dtype of the model's parameters."""
        return self.peak_of(next((parameter.dtype for parameter in self.model.parameters()), torch.float32))

    @property
    def are_peaks_known(self) -> bool:
        """Whether MFU can be worked out without a peak to measure first."""
        if self._peak_flops is not None or self.flops is None or self.flops.unknown:
            return True
        return all(is_peak_known(_as_dtype(name), self.device) for name in self.flops.by_dtype)

    @property
    def counted(self) -> FlopCount | None:
        """The operations of a step, at the latest density; None before a count, and where an operator computes and
        could not be counted: ``flops.unknown`` names it."""
        return None if self.flops is None or self.flops.unknown else self.flops.at_density(self.density)

    @property
    def flops_per_step(self) -> int | None:
        """Operations that a step executes, at the latest density; None as ``counted`` is."""
        return None if self.counted is None else self.counted.executed

    @property
    def overlapped_share(self) -> float | None:
        """The share of communication, over all steps, that went on beside computation; None where there was none."""
        return self.communication.overlapped_share

    @property
    def communication_bytes_per_step(self) -> float | None:
        """Mean over all steps of the bytes that this rank gave to collectives and sent; None before the first."""
        given = self.communication.bytes + self.communication.sent_bytes
        return given / self.steps if self.steps else None

    @property
    def seconds_per_step(self) -> float | None:
        """Median over the timed steps."""
        return self.times.median()

    @property
    def mfu(self) -> float | None:
        """Operations of a step over its median seconds and the peak; None before a count and a timed step."""
        seconds = self.seconds_per_step
        return self.use_of_machine(seconds).get("mfu") if self.flops is not None and seconds else None

    @property
    def parameter_bytes(self) -> int:
        """Of the parameters that the model has now."""
        with contextlib.suppress(RuntimeError):  # asked by a scrape while the model gets another module
            self._parameter_bytes = sum(
                parameter.nbytes
                for parameter in self.model.parameters()
                if not isinstance(parameter, UninitializedParameter)
            )
        return self._parameter_bytes

    @property
    def peak_bytes(self) -> int:
        """Parameters, and what the process (on CUDA: torch's allocator) has added at most since the monitor began."""
        return self._bytes_before + self._meter.added

    @property
    def memory_ratio(self) -> float | None:
        """Peak bytes / parameter bytes; None for a model without parameters."""
        parameters = self.parameter_bytes
        return self.peak_bytes / parameters if parameters else None

    def summary(self) -> dict[str, object]:
        """All figures as plain values, for JSON; None for what is not known."""
        seconds, counted = self.seconds_per_step, self.counted
        use = {}
        if self.flops is not None and seconds:
            with contextlib.suppress(ValueError):  # a dtype of which torch has no matrix product
                use = self.use_of_machine(seconds)
        waited = self.communication.waited_seconds
        rows = sum(self._sampler.bits.values())
        return {
            "name": self.name,
            "steps": self.steps,
            "tokens": self.tokens,
            "total_seconds": self.total_seconds,
            "seconds_per_step": seconds,
            "seconds_per_step_p95": self.times.quantile(0.95),
            "outside_share": self._occupation.outside_share if self.steps > 1 else None,
            "flops_per_step": None if counted is None else counted.executed,
            "flops_per_step_dense_equivalent": None if counted is None else counted.dense_equivalent,
            "flops_by_dtype": None if counted is None else dict(counted.by_dtype),
            "uncounted_operators": [] if self.flops is None else list(self.flops.unknown),
            "peak_flops": {name: self.peak_of(name) for name in counted.by_dtype} if use else {},
            "mfu": use.get("mfu"),
            "mfu_dense_equivalent": use.get("mfu_dense_equivalent"),
            "peak_bytes": self.peak_bytes,
            "parameter_bytes": self.parameter_bytes,
            "memory_ratio": self.memory_ratio,
            "loss": self.loss.value,
            "odd_losses": self.odd_losses,
            "target_loss": self.target_loss,
            "steps_to_target": self.steps_to_target,
            "seconds_to_target": self.seconds_to_target,
            "density": self.density,
            "half_share": self.half_share,
            "bits": {str(width): count / rows for width, count in sorted(self._sampler.bits.items())} or None,
            "communication_bytes_per_step": self.communication_bytes_per_step,
            "overlapped_share": self.overlapped_share,
            "communication_waited_share": waited / self.total_seconds if self.communication.busy_seconds else None,
        }

    # ---- coming back

    def state_dict(self) -> dict:
        """What a resumed run needs to go on counting: plain numbers."""
        names = ("steps", "tokens", "total_seconds", "steps_to_target", "seconds_to_target")
        return {**{name: getattr(self, name) for name in names}, "loss": self.loss.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where the monitor that gave the state was.

        Raises:
            ValueError: it is no such state; nothing was changed.
        """
        try:
            values = {name: state[name] for name in ("steps", "tokens", "total_seconds")}
            values |= {name: state[name] for name in ("steps_to_target", "seconds_to_target")}
            odd = [name for name, value in values.items() if not _is_count(value, optional="target" in name)]
            if odd:
                raise ValueError(f"{odd[0]} is {short(values[odd[0]])}, expected a number of at least 0")
            self.loss.load_state_dict(state["loss"])
        except KeyError as error:
            raise ValueError(f"the state of the monitor lacks {error}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"the state is none of a monitor: {error}") from error
        for name, value in values.items():
            setattr(self, name, value)


def _is_count(value: object, optional: bool) -> bool:
    if value is None:
        return optional
    return isinstance(value, (int, float)) and 0 <= value < math.inf


def _as_dtype(name: str | torch.dtype) -> torch.dtype:
    return getattr(torch, name) if isinstance(name, str) else name


def default_name(model: nn.Module) -> str:
    name = type(model).__name__
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        name += f".rank{distributed.get_rank()}"
    return name
