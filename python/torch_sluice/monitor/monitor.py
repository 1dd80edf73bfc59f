"""``torch_sluice.Monitor``: the figures that say whether training uses the machine well, kept while it runs."""

import contextlib
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from torch_sluice.monitor.flops import count_flops
from torch_sluice.monitor.peak import measure_peak_flops
from torch_sluice.parallel.statistics import CommunicationStatistics, communication_statistics

MFU_LIMIT = 0.70  # below it the machine is not used well
MEMORY_RATIO_LIMIT = 10.0  # above it something other than the parameters takes the memory


class MonitorWarning(UserWarning):
    """A figure has left the range that the monitor was told to watch."""


class Monitor:
    """Watches a training loop: steps, tokens, FLOPs, MFU, memory, kept-pair density and communication.

    ::

        monitor = torch_sluice.Monitor(model, log_dir="runs/one")
        monitor.count_flops(lambda: loss_of(model, batch).backward())
        for batch in batches:
            with monitor.step(tokens=batch.numel()) as figures:
                ...
                figures["loss"] = loss.item()
                figures["density"] = controller.density
        print(monitor.summary())

    Args:
        model: its parameters are what memory is compared with.
        peak_flops: FLOP/s that count as full use; default: measured on this machine at the first call that needs it.
        mfu_limit, memory_ratio_limit: ``check()`` complains below the one and above the other.
        log_dir: folder for TensorBoard scalars; needs the ``tensorboard`` package.

    Memory is the peak that the process has added since the monitor was made: resident memory, or what torch allocated
    on the model's CUDA device.

    Communication is what this rank's process groups of the backend "sluice" did during the steps: the bytes that it
    gave to collectives and sent, and the overlapped share, 1 - waited / busy, with busy the time that collectives ran
    and waited the part of it during which the computation stood still, see
    :class:`torch_sluice.parallel.CommunicationStatistics`. Both are scalars of every step too, ``communication_bytes``
    and ``overlapped_share``; a step without communication has no share.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        peak_flops: float | None = None,
        mfu_limit: float = MFU_LIMIT,
        memory_ratio_limit: float = MEMORY_RATIO_LIMIT,
        log_dir: str | Path | None = None,
    ):
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"peak_flops is {peak_flops}, expected a positive number of FLOP/s")
        parameters = list(model.parameters())
        self.parameter_bytes = sum(p.numel() * p.element_size() for p in parameters)
        self._device = parameters[0].device if parameters else torch.device("cpu")
        self._dtype = parameters[0].dtype if parameters else torch.float32
        self._peak_flops = peak_flops
        self._limits = (mfu_limit, memory_ratio_limit)
        self._writer = _open_writer(log_dir)
        self._memory_before = self._memory_now()
        self.flops_per_step: int | None = None
        self.steps = self.tokens = 0
        self.seconds: list[float] = []
        self.density: float | None = None
        self.communication = CommunicationStatistics()
        self._communication_before = communication_statistics()

    @contextlib.contextmanager
    def step(self, tokens: int = 0) -> Iterator[dict[str, float]]:
        """Times one optimizer step. What is put into the yielded dict becomes scalars; ``density`` is also kept."""
        figures: dict[str, float] = {}
        self._communication_before = communication_statistics()
        start = time.perf_counter()
        yield figures
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.record(time.perf_counter() - start, tokens, **figures)

    def record(self, seconds: float, tokens: int = 0, **figures: float) -> None:
        """Adds a step that was timed elsewhere. Its communication is what came since the step before it."""
        communicated = self._take_communication()
        self.steps += 1
        self.tokens += tokens
        self.seconds.append(seconds)
        self.density = figures.get("density", self.density)
        if self._writer is not None:
            scalars = {"seconds": seconds, "tokens_per_second": tokens / seconds if seconds > 0 else 0.0}
            scalars.update(communicated, **figures)
            if self.flops_per_step is not None and seconds > 0:
                scalars["mfu"] = self.flops_per_step / seconds / self.peak_flops
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, self.steps)

    def count_flops(self, step: Callable[[], object]) -> int:
        """Runs the function once and takes its floating-point operations as those of a step. A gated attention counts
        the pairs that it computes, so count again when the density has changed."""
        self.flops_per_step = count_flops(step)
        return self.flops_per_step

    def _take_communication(self) -> dict[str, float]:
        """Adds what was communicated since the last call. Returns it as scalars; none in a job without groups."""
        now = communication_statistics()
        step = now - self._communication_before
        self._communication_before = now
        self.communication = self.communication + step
        if not step.collectives and not step.sends:
            return {}
        scalars = {"communication_bytes": step.bytes + step.sent_bytes}
        return scalars if step.overlapped_share is None else {**scalars, "overlapped_share": step.overlapped_share}

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
    def peak_flops(self) -> float:
        if self._peak_flops is None:
            self._peak_flops = measure_peak_flops(self._dtype, self._device)
        return self._peak_flops

    @property
    def seconds_per_step(self) -> float | None:
        """Median over all steps."""
        return statistics.median(self.seconds) if self.seconds else None

    @property
    def mfu(self) -> float | None:
        """FLOPs of a step / (median seconds x peak FLOP/s); None before ``count_flops`` and a step."""
        if self.flops_per_step is None or not self.seconds:
            return None
        return self.flops_per_step / self.seconds_per_step / self.peak_flops

    @property
    def peak_bytes(self) -> int:
        return max(self._memory_now() - self._memory_before, 0)

    @property
    def memory_ratio(self) -> float | None:
        """Peak bytes / parameter bytes; None for a model without parameters."""
        return self.peak_bytes / self.parameter_bytes if self.parameter_bytes else None

    def summary(self) -> dict[str, float | int | None]:
        return {
            "steps": self.steps,
            "tokens": self.tokens,
            "seconds_per_step": self.seconds_per_step,
            "flops_per_step": self.flops_per_step,
            "peak_flops": self.peak_flops,
            "mfu": self.mfu,
            "peak_bytes": self.peak_bytes,
            "parameter_bytes": self.parameter_bytes,
            "memory_ratio": self.memory_ratio,
            "density": self.density,
            "communication_bytes_per_step": self.communication_bytes_per_step,
            "overlapped_share": self.overlapped_share,
        }

    def check(self) -> list[str]:
        """Sentences about figures outside their limits, each also given as a ``MonitorWarning``."""
        problems = find_problems(self.mfu, self.memory_ratio, *self._limits)
        for problem in problems:
            warnings.warn(problem, MonitorWarning, stacklevel=2)
        return problems

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _memory_now(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return peak_resident_bytes()


def find_problems(
    mfu: float | None,
    memory_ratio: float | None,
    mfu_limit: float = MFU_LIMIT,
    memory_ratio_limit: float = MEMORY_RATIO_LIMIT,
) -> list[str]:
    problems = []
    if mfu is not None and mfu < mfu_limit:
        problems.append(f"MFU is {mfu:.0%}, below {mfu_limit:.0%}: the arithmetic units wait for something else")
    if memory_ratio is not None and memory_ratio > memory_ratio_limit:
        problems.append(
            f"peak memory is {memory_ratio:.1f} times the parameters, above {memory_ratio_limit:g}: activations weigh "
            "more than the model (shorter micro-batches or activation checkpointing lower it)"
        )
    return problems


def peak_resident_bytes() -> int:
    """The most memory that this process has had resident so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _open_writer(log_dir):
    if log_dir is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"log_dir is {str(log_dir)!r}, which needs TensorBoard: pip install tensorboard") from error
    return SummaryWriter(str(log_dir))
