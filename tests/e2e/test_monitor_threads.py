"""Steps that overlap: requests in several threads, steps begun and left, and the counter on torch's stack of modes."""

import gc
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from torch_sluice.monitor import Monitor, MonitorWarning
from torch_sluice.monitor.counter import StepFlopCounter
from torch_sluice.monitor.records import Occupation, own_work

LIMITS = dict(peak_flops=1e9, mfu_limit=None, memory_ratio_limit=None)


@pytest.fixture
def clock(monkeypatch):
    """A clock for each thread: the monitor's time is ``clock.now`` of whoever asks."""
    local = threading.local()
    monkeypatch.setattr("torch_sluice.monitor.monitor.time.perf_counter", lambda: getattr(local, "now", 0.0))
    return local


def no_mode_is_left() -> bool:
    compiled = torch.compile(torch.sin, backend="eager", fullgraph=True)  # raises where torch believes in a mode
    return _get_current_dispatch_mode_stack() == [] and bool(compiled(torch.zeros(1)) == 0)


@pytest.mark.parametrize("by_hand", [False, True])
def test_requests_in_several_threads_are_all_recorded_with_their_own_times(clock, by_hand):
    model, threads, requests = nn.Linear(8, 4), 4, 25
    together = threading.Barrier(threads)

    def serve(number):
        for request in range(requests):
            together.wait()
            clock.now = 1000.0 * request
            if by_hand:
                monitor.begin_step()
            else:
                step = monitor.step(tokens=3)
                step.__enter__()
            together.wait()  # all are in a step
            model(torch.randn(3, 8))
            clock.now += 1 + number + threads * request  # each step has a duration of its own
            if by_hand:
                monitor.pause_step()
                clock.now += 500.0
                monitor.end_step(3, {"loss": 1.0})
            else:
                step.__exit__(None, None, None)

    with warnings.catch_warnings(record=True) as caught, Monitor(model, **LIMITS) as monitor:
        warnings.simplefilter("always")
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(serve, range(threads)))
    assert caught == []
    assert monitor.steps == threads * requests
    assert monitor.tokens == 3 * threads * requests
    assert monitor.total_seconds == sum(range(1, threads * requests + 1))
    timed = sorted(monitor.times.seconds)
    assert len(timed) == threads * requests - 1  # one was counted
    assert set(timed) <= set(map(float, range(1, threads * requests + 1)))
    assert len(set(timed)) == len(timed)
    assert monitor.flops_per_step == 2 * 3 * 8 * 4
    assert no_mode_is_left()


def test_requests_that_fail_take_no_other_with_them(tmp_path):
    model = nn.Linear(8, 4)

    def serve(number):
        if number % 5 == 0:
            with pytest.raises(ZeroDivisionError), monitor.step():
                1 / 0  # noqa: B018
        else:
            with monitor.step() as figures:
                model(torch.randn(3, 8))
                figures["loss"] = 1.0

    with Monitor(model, jsonl=tmp_path / "steps.jsonl", **LIMITS) as monitor, ThreadPoolExecutor(4) as pool:
        list(pool.map(serve, range(100)))
    assert monitor.steps == 80
    assert len((tmp_path / "steps.jsonl").read_text().splitlines()) == 80
    assert monitor.flops_per_step == 2 * 3 * 8 * 4


def test_a_peak_is_not_measured_beside_a_running_step(monkeypatch):
    measured_beside = []
    monkeypatch.setattr("torch_sluice.monitor.figures.is_peak_known", lambda dtype, device: bool(measured_beside))

    def measure(dtype, device):
        measured_beside.append(len(monitor._running))
        return 1e9

    monkeypatch.setattr("torch_sluice.monitor.figures.peak_flops_of", measure)
    model = nn.Linear(8, 4)
    monitor = Monitor(model, mfu_limit=None)
    monitor.count_flops(lambda: model(torch.randn(3, 8)))
    entered, leave = threading.Event(), threading.Event()

    def long_request():
        with monitor.step():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=long_request)
    thread.start()
    entered.wait(60)
    for _ in range(12):
        with monitor.step():
            pass
    assert measured_beside == []
    assert "mfu" not in monitor.latest
    leave.set()
    thread.join()
    assert set(measured_beside) == {0}
    assert "mfu" in monitor.latest


def test_the_monitor_may_be_closed_while_requests_run():
    monitor = Monitor(nn.Linear(2, 2), **LIMITS)
    entered, leave = threading.Event(), threading.Event()

    def request():
        with monitor.step():
            entered.set()
            leave.wait(60)

    with pytest.warns(MonitorWarning, match="is closed"):
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(request)
            entered.wait(60)
            monitor.close()
            leave.set()
            future.result()
    assert monitor.steps == 0
    assert no_mode_is_left()


def test_steps_of_one_thread_that_overlap_are_not_counted_together():
    """As requests that take turns in an event loop: the operators of one cannot be told from another's."""
    model = nn.Linear(8, 4)
    with Monitor(model, **LIMITS) as monitor:
        one, other = monitor.step(), monitor.step()
        one.__enter__()
        other.__enter__()
        assert no_mode_is_left()  # nor does counting slow them any longer
        model(torch.randn(3, 8))
        one.__exit__(None, None, None)
        model(torch.randn(3, 8))
        other.__exit__(None, None, None)
        assert monitor.flops_per_step is None
        assert monitor.steps == 2
        assert no_mode_is_left()
        with monitor.step():
            model(torch.randn(3, 8))
    assert monitor.flops_per_step == 2 * 3 * 8 * 4


class Passing(TorchDispatchMode):
    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        return operator(*args, **(kwargs or {}))


def test_a_counter_comes_off_the_stack_from_below_another_mode():
    counter, mode = StepFlopCounter(), Passing()
    counter.__enter__()
    mode.__enter__()
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    counter.__exit__(None, None, None)
    assert _get_current_dispatch_mode_stack() == [mode]
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    mode.__exit__(None, None, None)
    assert counter.count.executed == 16
    assert no_mode_is_left()


def test_counters_that_end_in_the_order_in_which_they_began():
    counters = [StepFlopCounter() for _ in range(3)]
    for counter in counters:
        counter.__enter__()
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    for counter in counters:
        counter.__exit__(None, None, None)
    assert [counter.count.executed for counter in counters] == [48, 32, 16]
    assert no_mode_is_left()


def test_a_counter_that_ends_in_another_thread_counts_no_longer():
    counter = StepFlopCounter()
    counter.__enter__()
    thread = threading.Thread(target=counter.__exit__, args=(None, None, None))
    thread.start()
    thread.join()
    torch.mm(torch.ones(2, 2), torch.ones(2, 2))
    assert counter.count.executed == 0
    with StepFlopCounter():
        assert counter not in _get_current_dispatch_mode_stack()
    assert no_mode_is_left()


def test_a_monitor_that_was_dropped_in_its_first_step_counts_no_longer():
    monitor = Monitor(nn.Linear(2, 2), **LIMITS)
    monitor.begin_step()
    (counter,) = _get_current_dispatch_mode_stack()
    del monitor
    gc.collect()
    assert counter.over
    with StepFlopCounter():
        assert counter not in _get_current_dispatch_mode_stack()
    assert no_mode_is_left()


def test_only_one_thread_counts_at_a_time():
    models = nn.Linear(8, 4), nn.Linear(8, 2)
    with Monitor(models[0], **LIMITS) as one, Monitor(models[1], **LIMITS) as other:

        def serve():
            with other.step():
                models[1](torch.randn(3, 8))

        for _ in range(2):
            with one.step(), ThreadPoolExecutor(1) as pool:
                pool.submit(serve).result()
                models[0](torch.randn(3, 8))
    assert one.flops_per_step == 2 * 3 * 8 * 4
    assert other.flops_per_step == 2 * 3 * 8 * 2  # of its second step
    assert (one.steps, other.steps) == (2, 2)


# ---- the time outside of steps


def test_time_outside_is_what_no_step_and_no_monitor_takes(monkeypatch):
    now = 0.0
    monkeypatch.setattr("torch_sluice.monitor.records.time.perf_counter", lambda: now)
    occupation = Occupation()
    assert occupation.outside_share is None
    with own_work():  # before the first step
        now = 5.0
    occupation.begin_step(10.0)
    occupation.begin_step(11.0)  # another thread's
    occupation.end_step(13.0)
    occupation.end_step(14.0)
    now = 15.0
    with own_work(), own_work():
        now = 18.0
    occupation.begin_step(21.0)
    occupation.end_step(22.0)
    now = 99.0
    with own_work():  # after the last one
        now = 200.0
    assert occupation.outside_share == (1 + 3) / (4 + 1 + 3 + 1)


def test_measuring_the_peak_is_not_time_outside_of_steps(monkeypatch):
    """Twenty steps of 50 ms with nothing between them, and a second for the peak."""
    now = 0.0
    monkeypatch.setattr("torch_sluice.monitor.monitor.time.perf_counter", lambda: now)
    monkeypatch.setattr("torch_sluice.monitor.peak._known_peaks", {})

    def measure(dtype, device):
        nonlocal now
        now += 1.0
        return 1e9

    monkeypatch.setattr("torch_sluice.monitor.peak.measure_peak_flops", measure)
    model = nn.Linear(8, 4)
    with Monitor(model, mfu_limit=None, memory_ratio_limit=None) as monitor, Monitor(nn.Linear(2, 2)) as other:
        for step in range(20):
            with monitor.step():
                model(torch.randn(3, 8))
                now += 0.05
            if step == 10:
                monitor.check()
                monitor.count_flops(lambda: torch.mm(model.weight.double(), torch.zeros(8, 3, dtype=torch.double)))
                other.record(0.1)
    assert now == pytest.approx(20 * 0.05 + 2.0)  # two dtypes
    assert monitor.summary()["outside_share"] == 0
    assert monitor.summary()["mfu"] == pytest.approx(2 * 3 * 8 * 4 / 0.05 / 1e9)
