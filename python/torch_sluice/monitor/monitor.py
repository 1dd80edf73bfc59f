"""``torch_sluice.Monitor``: the figures that say whether a model uses the machine well, kept while it runs."""

import contextlib
import importlib.util
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from numbers import Integral
from pathlib import Path

import torch
from torch import nn

from torch_sluice.monitor.counter import StepFlopCounter, load_counter, measure_flops
from torch_sluice.monitor.figures import Figures
from torch_sluice.monitor.flops import FlopCount
from torch_sluice.monitor.limits import (
    MEMORY_RATIO_LIMIT,
    MFU_LIMIT,
    check_limit,
    find_problems,
    is_memory_judged,
    warn,
)
from torch_sluice.monitor.names import RESERVED, MetricNames
from torch_sluice.monitor.numbers import as_number, as_text, short
from torch_sluice.monitor.outputs import Output
from torch_sluice.monitor.records import Step, own_work
from torch_sluice.parallel.statistics import communication_statistics

_TENSORBOARD_SHARE = 0.001  # of the time of the steps

_monitors: "weakref.WeakSet[Monitor]" = weakref.WeakSet()


def _renew_locks() -> None:
    """In a forked process: what held a lock there is not in it."""
    for monitor in _monitors:
        monitor._lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_locks)


class Monitor(Figures):
    """Watches training or inference: steps, FLOPs, MFU, memory, the way to a target loss, and what Sluice's parts do.

    ::

        with torch_sluice.Monitor(model, target_loss=2.5, jsonl="run.jsonl", report="run.html") as monitor:
            for batch in batches:
                with monitor.step(tokens=batch.numel()) as figures:
                    ...                                    # forward, backward, optimizer; or one request
                    figures["loss"] = loss.item()
        print(monitor.summary())

    What each figure means, and what is taken from the model by itself, is in docs/monitor.md. Whatever fails in the
    monitor while a run goes on becomes one ``MonitorWarning``; the run goes on.

    Args:
        model: its parameters are what memory is compared with; its gates, quantised modules and accumulators are
            looked at now and then.
        name: what the outputs call this monitor; default: the model's class, with the rank in a parallel job.
        peak_flops: FLOP/s that count as full use, a number for every dtype; default: measured on this machine for each
            dtype that the model computes in, when it is first needed.
        mfu_limit, memory_ratio_limit: a warning comes, once, below the one and above the other; None: none.
        target_loss: a number; the steps and seconds to it are noted when the smoothed figure "loss" reaches it.
        count_first_step: count the operations of the first ``step()``, which takes longer for it and is not timed.
        log_dir: folder for TensorBoard scalars; needs the ``tensorboard`` package.
        jsonl: file to which a line is appended for each step.
        metrics_port: port for Prometheus text, 0: any free one (``monitor.metrics_port`` says which); needs
            ``prometheus-client``. Monitors of a process share a port that they name alike.
        metrics_host: address that it is served on.
        report: file for the HTML page that ``close()`` writes; needs ``jinja2`` and ``matplotlib``.

    Raises:
        TypeError, ValueError: an argument is not what is expected, or nothing can listen on the port.
        ImportError: an output needs a package that is missing.

    Attributes:
        steps, tokens: so far. total_seconds: of all steps.
        flops: the ``FlopCount`` of a step; None until one has been counted.
        density, half_share: as they were last given or looked at; None: unknown.
        communication: ``CommunicationStatistics`` of all steps together.
        steps_to_target, seconds_to_target: None until the target loss is reached.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str | None = None,
        peak_flops: float | None = None,
        mfu_limit: float | None = MFU_LIMIT,
        memory_ratio_limit: float | None = MEMORY_RATIO_LIMIT,
        target_loss: float | None = None,
        count_first_step: bool = True,
        log_dir: str | Path | None = None,
        jsonl: str | Path | None = None,
        metrics_port: int | None = None,
        metrics_host: str = "127.0.0.1",
        report: str | Path | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
        if peak_flops is not None and not 0 < _number_or_nan(peak_flops) < math.inf:
            raise ValueError(f"peak_flops is {peak_flops!r}, expected a positive number of FLOP/s")
        check_limit("mfu_limit", mfu_limit)
        check_limit("memory_ratio_limit", memory_ratio_limit)
        if target_loss is not None and not math.isfinite(_number_or_nan(target_loss)):
            raise ValueError(f"target_loss is {target_loss!r}, expected a finite number")
        if metrics_port is not None and not (_is_integer(metrics_port) and 0 <= metrics_port < 65536):
            raise ValueError(f"metrics_port is {metrics_port!r}, expected an integer from 0 to 65535")
        metrics_port = None if metrics_port is None else int(metrics_port)
        if not isinstance(metrics_host, str):
            raise ValueError(f"metrics_host is {metrics_host!r}, expected an address or a name, as '127.0.0.1'")
        for option, path in (("log_dir", log_dir), ("jsonl", jsonl), ("report", report)):
            if path is not None and (not isinstance(path, (str, os.PathLike)) or "\0" in os.fspath(path)):
                raise ValueError(f"{option} is {path!r}, expected a path")
        super().__init__(model, name, peak_flops, target_loss)
        self.limits = (mfu_limit, memory_ratio_limit)
        self._wants_count = count_first_step
        self._warned: set[str] = set()
        self._check_at = 10

        self._lock = threading.RLock()  # of all that steps in several threads share
        _monitors.add(self)
        self._has_begun = False
        self._running: list[Step] = []
        self._step_of_thread: dict[int, Step | None] = {}  # of those that ``begin_step()`` began
        self._metrics = MetricNames(self._warn_once)
        self.closed = False
        self._report = _check_report(report)
        self.metrics_port: int | None = None
        self._outputs = self._open_outputs(log_dir, jsonl, metrics_port, metrics_host)

    def _open_outputs(self, log_dir, jsonl, metrics_port, metrics_host) -> list[Output]:
        outputs = []
        try:
            if metrics_port is not None:
                from torch_sluice.monitor.outputs.prometheus import Prometheus

                prometheus = Prometheus(metrics_port, metrics_host, self.name, self._read_metrics)
                self.metrics_port = prometheus.port
                outputs.append(Output("Prometheus metrics", lambda: prometheus))
            if log_dir is not None:
                from torch_sluice.monitor.outputs.tensorboard import TensorBoard

                what = f"TensorBoard scalars in {str(log_dir)!r}"
                outputs.append(Output(what, lambda: TensorBoard(log_dir), _TENSORBOARD_SHARE))
            if jsonl is not None:
                from torch_sluice.monitor.outputs.json_lines import JsonLines

                outputs.append(Output(f"JSON lines in {str(jsonl)!r}", lambda: JsonLines(jsonl, self.name)))
        except BaseException:
            for output in outputs:
                output.close()
            raise
        return outputs

    # ---- steps

    @contextlib.contextmanager
    def step(self, tokens: int = 0) -> Iterator[dict[str, float]]:
        """Times one optimizer step, or one request; several may run at a time, in threads of their own. What is put
        into the yielded dict becomes figures of the step; "loss", "density" and "half_share" are also kept. A step
        that an exception ends is not recorded."""
        figures: dict[str, float] = {}
        step = self._begin()
        try:
            yield figures
        except BaseException:
            self._abandon(step)
            raise
        self._pause(step)
        self._end(step, tokens, figures)

    def begin_step(self) -> None:
        """For loops that can't use ``step()``: the step of this thread begins. ``end_step()`` records it, in the same
        thread. One that had begun and not ended is forgotten."""
        self._abandon(self._step_of_thread.pop(threading.get_ident(), None))
        self._step_of_thread[threading.get_ident()] = self._begin()

    def pause_step(self) -> None:
        """The step has ended, and ``end_step()`` will come later, when its figures are known."""
        self._pause(self._step_of_thread.get(threading.get_ident()))

    def end_step(self, tokens: int = 0, figures: dict[str, float] | None = None) -> None:
        """Records the step that ``begin_step()`` began in this thread; does nothing if there is none."""
        step = self._step_of_thread.pop(threading.get_ident(), None)
        self._pause(step)
        self._end(step, tokens, figures or {})

    def abandon_step(self) -> None:
        """Forgets steps that ``begin_step()`` began, in whichever thread, and that will not end."""
        for thread in list(self._step_of_thread):
            self._abandon(self._step_of_thread.pop(thread, None))

    def _begin(self) -> Step | None:
        with own_work(), self._lock:
            if self._is_closed():
                return None
            if not self._running:
                self._communication_before = communication_statistics()
            self._attempt("looking at the model", self._sampler.start_step)
            if not self._has_begun:
                self._has_begun = True
                self._attempt("looking at the model", self._follow_device)
            step = Step()
            beside = [other for other in self._running if other.thread == step.thread]
            for other in beside:  # what they run cannot be told from what this one does
                other.is_mixed = True
                if other.counter is not None:
                    self._attempt("counting FLOPs", other.counter.__exit__, None, None, None)
            is_counting = any(other.counter is not None and not other.is_mixed for other in self._running)
            if self._wants_count and self.flops is None and not beside and not is_counting:
                self._attempt("counting FLOPs", self._start_counter, step)
            self._running.append(step)
        step.begun = time.perf_counter()
        self._occupation.begin_step(step.begun)
        return step

    def _pause(self, step: Step | None) -> None:
        if step is None or step.seconds is not None:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self._stop(step)

    def _stop(self, step: Step) -> None:
        """The step no longer runs. Its time is taken before the wait for what other threads record."""
        now = time.perf_counter()
        with self._lock:
            if step.seconds is not None:  # close() was quicker, in another thread
                return
            step.seconds = now - step.begun
            self._occupation.end_step(now)
            self._running.remove(step)
        if step.counter is not None:
            self._attempt("counting FLOPs", step.counter.__exit__, None, None, None)

    def _end(self, step: Step | None, tokens: int, figures: dict[str, float]) -> None:
        if step is None:
            return
        with own_work(), self._lock:
            if self._is_closed():
                return
            if step.counter is not None and not step.is_mixed:
                self._take_count(step.counter.count)
            timed = step.counter is None
            self._attempt("recording a step", self._record, step.seconds, tokens, figures, timed)

    def _abandon(self, step: Step | None) -> None:
        if step is not None:
            self._stop(step)
            self._sampler.stop()

    def record(self, seconds: float, tokens: int = 0, **figures: float) -> None:
        """Adds a step that was timed elsewhere. Its communication is what came since the step before it."""
        with own_work(), self._lock:
            if not self._is_closed():
                self._attempt("recording a step", self._record, seconds, tokens, figures, True)
                self._attempt("looking at the model", self._sampler.start_step)

    def count_flops(self, step: Callable[[], object]) -> int | None:
        """Runs the function once and takes its floating-point operations as those of a step; returns those that were
        executed; None, and a warning that names it, where an operator computes and has no formula. Later steps with
        another density are counted by proportion."""
        with own_work():
            with self._meter.excluding():
                load_counter()
            self._take_count(measure_flops(step))
        return self.flops_per_step

    def _start_counter(self, step: Step) -> None:
        with self._meter.excluding():
            load_counter()
        step.counter = StepFlopCounter.begin_alone(step)

    def _take_count(self, count: FlopCount) -> None:
        self.flops = count
        if count.unknown:
            self._warn_once("unknown operators", count.why_unknown())

    def _follow_device(self) -> None:
        """The model may have gone to its device after the monitor was made."""
        if self._find_device() != self.device:
            self._begin_metering()

    def _record(self, seconds: float, tokens: int, given: dict[str, float], timed: bool) -> None:
        tokens = self._count_or_nothing("tokens", tokens) or 0
        seconds = self._count_or_nothing("seconds", seconds)
        if seconds is None:
            return
        self.add_step(seconds, tokens, timed)
        figures = {"seconds": seconds, "tokens": tokens}
        if tokens and seconds > 0:
            figures["tokens_per_second"] = tokens / seconds
        figures.update(self.take_communication())
        given = self._as_numbers(given)
        may_measure = not self._running or self.are_peaks_known  # neither may disturb the other
        sampled = self._attempt("looking at the model", self._sampler.end_step, seconds, "density" not in given)
        figures.update(sampled or {}, **given)
        self.density = figures.get("density", self.density)
        if timed and self.flops is not None and seconds > 0 and may_measure:
            figures.update(self._attempt("working out MFU", self.use_of_machine, seconds) or {})
        if "loss" in figures:
            self._take_loss(figures["loss"])
        if self.metrics_port is not None:
            self._metrics.claim(figures)
        self.add_figures(figures, timed)
        for output in self._outputs:
            output.write(self.steps, seconds, figures)
        if self.steps >= self._check_at and may_measure:
            self._check_at = 2 * self.steps
            self.check()

    def _count_or_nothing(self, name: str, value) -> float | None:
        """A number that counts something; None, and a warning, for what is none."""
        try:
            number = as_number(value)
            if not 0 <= number < math.inf:
                raise ValueError("expected a finite number of at least 0")
            return number
        except Exception as error:
            self._warn_once(f"odd {name}", f"{name} is {short(value)} for a step, which does not count: {error}")
            return None

    def _as_numbers(self, given: dict) -> dict[str, float]:
        numbers = {}
        for name, value in given.items():
            try:
                text = as_text(name)
                if text in RESERVED:
                    raise ValueError("that name is the monitor's own")
                numbers[text] = as_number(value)
            except Exception as error:  # of whatever kind: the value may be an object of another library
                self._warn_once(f"figure {name}", f"the figure {name!r} is left out of the monitor: {error}")
        return numbers

    def _take_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            self._warn_once("loss", f"the loss became {loss} at step {self.steps}; a smaller learning rate or clipping "
                            "of gradients is the first thing to try")  # fmt: skip
        self.add_loss(loss)

    # ---- limits, and what a scrape sees

    def check(self) -> list[str]:
        """Sentences about the figures beyond their limits. Each kind is also warned of, the first time."""
        summary = self.summary()
        ratio = summary["memory_ratio"] if is_memory_judged(summary) else None
        problems = find_problems(summary["mfu"], ratio, *self.limits, summary=summary)
        for problem in problems:
            self._warn_once(problem.split(" is ")[0], problem)
        return problems

    def _read_metrics(self) -> tuple[dict, dict]:
        """Counters and gauges for a scrape, from another thread. Nothing here measures a peak."""
        counters = {("steps",): self.steps, ("tokens",): self.tokens, ("seconds",): self.total_seconds}
        gauges = {(name,): value for name, value in self.latest.items() if self._metrics.shows(name)}
        for share in (0.5, 0.95):
            value = self.times.quantile(share, last=1000)
            if value is not None:
                gauges["step_seconds", str(share)] = value
        for name in ("peak_bytes", "memory_ratio", "density", "half_share"):
            if (value := getattr(self, name)) is not None:
                gauges[name,] = value
        return counters, gauges

    # ---- coming back, and the end

    def write_report(self, path: str | Path) -> None:
        """Writes the HTML page: figures, what they mean, warnings, plots.

        Raises:
            ImportError: jinja2 or matplotlib is missing.
            OSError: the file can't be written.
        """
        from torch_sluice.report.monitor_page import write_monitor_page

        write_monitor_page(self, Path(path))

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self, *, report: bool = True) -> None:
        """Checks the limits, writes the report (unless ``report`` is False) and closes the outputs. Later steps are not
        recorded. Again: nothing."""
        with own_work(), self._lock:
            if self.closed:
                return
            for thread, step in list(self._step_of_thread.items()):
                if step is not None and step.seconds is not None:  # it has ended, and its figures will not come
                    self._end(self._step_of_thread.pop(thread, None), 0, {})
            self.abandon_step()
            self._sampler.stop()
            self._attempt("reading the peak of memory", self._meter.stop)  # the report's packages are not the run's
            self.closed = True
            if self.steps:
                self._attempt("checking the limits", self.check)
            if self._report is not None and report:
                self._attempt(f"writing the report {str(self._report)!r}", self.write_report, self._report)
            for output in self._outputs:
                output.close()

    def _is_closed(self) -> bool:
        if self.closed:
            self._warn_once("closed", f"the monitor {self.name!r} is closed: steps are no longer recorded")
        return self.closed

    def _attempt(self, what: str, call: Callable, *arguments):
        """The call's result; None, and one warning, if it fails: a monitor doesn't end what it watches."""
        try:
            return call(*arguments)
        except Exception as error:
            self._warn_once(what, f"{what} failed, the run goes on: {getattr(error, 'strerror', None) or error}")
            return None

    def _warn_once(self, kind: str, message: str) -> None:
        with self._lock:
            if kind in self._warned:
                return
            self._warned.add(kind)
        warn(message)


def _number_or_nan(value: object) -> float:
    try:
        return math.nan if isinstance(value, str) else as_number(value)
    except Exception:  # whatever it is, it is no number
        return math.nan


def _is_integer(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_report(path: str | Path | None) -> Path | None:
    missing = [name for name in ("jinja2", "matplotlib") if path is not None and not importlib.util.find_spec(name)]
    if missing:
        raise ImportError(
            f"report is {str(path)!r}, which needs {' and '.join(missing)}: pip install 'torch-sluice[monitor]'"
        )
    return None if path is None else Path(path)
