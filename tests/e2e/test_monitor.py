"""The monitor in a loop: what it adds up, where it warns, and that it never ends what it watches."""

import math
import warnings

import pytest
import torch
from torch import nn

import torch_sluice
from torch_sluice.monitor import Monitor, MonitorWarning, count_flops, formulas
from torch_sluice.monitor.records import Budget, Curve, MovingAverage


def quiet_monitor(model=None, **options):
    """A monitor that doesn't measure a peak and has no limits."""
    defaults = dict(peak_flops=1e6, mfu_limit=None, memory_ratio_limit=None)
    return Monitor(nn.Linear(8, 4) if model is None else model, **{**defaults, **options})


def test_a_loop_is_summed_up():
    model = nn.Linear(8, 4)
    monitor = quiet_monitor(model)
    monitor.count_flops(lambda: model(torch.randn(3, 8)))
    for seconds in (0.5, 0.25, 0.125):
        monitor.record(seconds, tokens=10, density=seconds)
    summary = monitor.summary()
    assert summary["steps"] == 3
    assert summary["tokens"] == 30
    assert summary["total_seconds"] == 0.875
    assert summary["seconds_per_step"] == 0.25
    assert summary["density"] == 0.125
    assert summary["mfu"] == pytest.approx(192 / 0.25 / 1e6)
    assert summary["parameter_bytes"] == 4 * (8 * 4 + 4)


def test_the_first_step_is_counted_and_not_timed():
    model = nn.Linear(8, 4)
    with quiet_monitor(model) as monitor:
        for _ in range(3):
            with monitor.step():
                model(torch.randn(3, 8)).sum().backward()
    assert monitor.flops.executed == monitor.flops.dense_equivalent == 2 * 192  # forward, and the weights' gradient
    assert dict(monitor.flops.by_dtype) == {"float32": 384}
    assert (monitor.steps, len(monitor.times.seconds)) == (3, 2)
    assert monitor.mfu == pytest.approx(384 / monitor.seconds_per_step / 1e6)
    assert 0 <= monitor.summary()["outside_share"] < 1


def test_counting_goes_through_a_compiled_model_without_a_word():
    model = nn.Linear(8, 4)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(torch.randn(3, 8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with quiet_monitor(model) as monitor, monitor.step():
            compiled(torch.randn(3, 8)).sum().backward()
    assert caught == []
    assert monitor.flops.executed == 384


def test_mfu_takes_each_dtype_at_its_own_peak(monkeypatch):
    peaks = {torch.float32: 1e6, torch.bfloat16: 4e6}
    monkeypatch.setattr("torch_sluice.monitor.figures.peak_flops_of", lambda dtype, device: peaks[dtype])
    model = nn.Linear(8, 4)
    monitor = Monitor(model, mfu_limit=None)

    def step():
        model(torch.randn(3, 8))
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(3, 8))

    monitor.count_flops(step)
    monitor.record(0.01)
    assert dict(monitor.flops.by_dtype) == {"float32": 192, "bfloat16": 192}
    assert monitor.mfu == pytest.approx((192 / 1e6 + 192 / 4e6) / 0.01)


def test_latency_of_requests():
    monitor = quiet_monitor()
    for milliseconds in range(100, 0, -1):
        monitor.record(milliseconds / 1000)
    assert monitor.summary()["seconds_per_step"] == pytest.approx(0.0505)
    assert monitor.summary()["seconds_per_step_p95"] == 0.095


def test_the_way_to_a_target_loss():
    monitor = quiet_monitor(target_loss=1.0)
    losses = [3.0, 1.2, 0.2, 0.1, 0.1, 0.1, 0.1, 5.0]
    average, reached = MovingAverage(), None
    for step, loss in enumerate(losses, 1):
        monitor.record(0.5, loss=loss)
        if average.add(loss) <= 1.0 and reached is None:
            reached = step
    assert reached not in (None, 1, len(losses))
    assert (monitor.steps_to_target, monitor.seconds_to_target) == (reached, 0.5 * reached)


def test_a_target_that_is_never_reached_is_said_to_be_so():
    monitor = quiet_monitor(target_loss=0.5)
    monitor.record(0.5, loss=1.0)
    monitor.close()
    assert (monitor.summary()["steps_to_target"], monitor.summary()["seconds_to_target"]) == (None, None)


def test_a_loss_that_is_not_finite_warns_once_and_is_left_out_of_the_average():
    with quiet_monitor(target_loss=2.0) as monitor:
        monitor.record(0.1, loss=1.0)
        with pytest.warns(MonitorWarning, match="the loss became nan at step 2") as caught:
            for _ in range(3):
                monitor.record(0.1, loss=math.nan)
        assert len(caught) == 1
        monitor.record(0.1, loss=1.5)
    assert monitor.odd_losses == 3
    assert math.isfinite(monitor.loss.value)
    assert monitor.steps_to_target == 1


def test_limits_warn_once_with_advice():
    model = nn.Linear(64, 64)
    monitor = Monitor(model, peak_flops=1e18, memory_ratio_limit=10)
    monitor.count_flops(lambda: model(torch.randn(1, 64)))
    with pytest.warns(MonitorWarning) as caught:
        for _ in range(200):
            monitor.record(0.001)
        memory = torch.ones(8 * 2**20)  # 32 MiB
        problems = monitor.check()
        monitor.close()
    del memory
    assert [str(warning.message) for warning in caught] == problems
    assert problems[0].startswith("MFU is 0%, below 70%: ")
    assert "larger batches or torch.compile" in problems[0]
    assert "times the parameters, above 10" in problems[1]


def test_within_the_limits_nothing_is_said():
    model = nn.Linear(64, 64)
    monitor = Monitor(model, peak_flops=1.0)
    monitor.count_flops(lambda: model(torch.randn(1, 64)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor.record(1.0)
        assert monitor.check() == []
        monitor.close()
    assert caught == []


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(peak_flops=0), "peak_flops is 0, expected a positive number"),
        (dict(mfu_limit=-0.1), "mfu_limit is -0.1, expected a number of at least 0, or None"),
        (dict(memory_ratio_limit=math.nan), "memory_ratio_limit is nan, expected a number"),
        (dict(target_loss=math.inf), "target_loss is inf, expected a finite number"),
        (dict(metrics_port=70000), "metrics_port is 70000, expected an integer from 0 to 65535"),
        (dict(metrics_port="9100"), "metrics_port is '9100', expected an integer"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        Monitor(nn.Linear(2, 2), **options)


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match=r"model is a list, expected a torch\.nn\.Module"):
        Monitor([])


def test_a_model_without_parameters():
    with quiet_monitor(nn.ReLU(), memory_ratio_limit=10) as monitor, monitor.step():
        pass
    assert monitor.memory_ratio is None
    assert monitor.check() == []
    assert monitor.summary()["mfu"] is None or monitor.summary()["mfu"] == 0


def test_figures_that_are_no_numbers_do_not_end_the_run():
    with quiet_monitor() as monitor:
        with pytest.warns(MonitorWarning) as caught:
            for _ in range(2):
                with monitor.step() as figures:
                    figures.update(loss=torch.tensor(2.0), text="words", seconds=3, both=torch.ones(2))
    assert monitor.latest["loss"] == 2.0
    assert {"text", "both"}.isdisjoint(monitor.latest)
    assert monitor.latest["seconds"] < 3
    assert len(caught) == 3


def test_an_exception_in_a_step_passes_through_and_leaves_nothing_behind():
    model = nn.Linear(8, 4)
    with quiet_monitor(model) as monitor:
        with pytest.raises(ZeroDivisionError):
            with monitor.step():
                1 / 0  # noqa: B018
        assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
        with monitor.step():
            model(torch.randn(3, 8))
    assert (monitor.steps, monitor.flops.executed) == (1, 192)


def test_after_the_end_steps_run_and_are_not_recorded():
    monitor = quiet_monitor()
    monitor.record(0.1)
    monitor.close()
    monitor.close()
    with pytest.warns(MonitorWarning, match="is closed: steps are no longer recorded") as caught:
        with monitor.step() as figures:
            figures["loss"] = 1.0
        monitor.record(0.1)
    assert len(caught) == 1
    assert monitor.summary()["steps"] == 1


def test_a_monitor_that_fails_inside_says_so_once_and_the_run_goes_on(monkeypatch):
    monitor = quiet_monitor()
    monkeypatch.setattr(monitor._sampler, "end_step", lambda *_: 1 / 0)
    with pytest.warns(MonitorWarning, match="looking at the model failed, the run goes on: division by zero") as caught:
        for _ in range(3):
            monitor.record(0.1)
    assert len(caught) == 1
    assert monitor.steps == 3


def test_tokens_that_are_no_number_do_not_end_the_run():
    monitor = quiet_monitor()
    with pytest.warns(MonitorWarning, match="tokens is .many. for a step, which does not count"):
        with monitor.step(tokens="many"):
            pass


def test_a_formula_that_fails_does_not_end_the_run(monkeypatch):
    def fail(*args, **options):
        raise ZeroDivisionError("in a formula")

    model = nn.Linear(8, 4)
    monkeypatch.setitem(formulas.OVERRIDES, torch.ops.aten.addmm, fail)
    with quiet_monitor(model) as monitor:
        with pytest.warns(MonitorWarning, match=r"not known.*: aten::addmm \(its .* failed: in a formula\)") as caught:
            for _ in range(2):
                with monitor.step():
                    model(torch.randn(3, 8)).sum().backward()
            assert monitor.count_flops(lambda: model(torch.randn(3, 8))) is None
        assert len(caught) == 1
    assert (monitor.flops_per_step, monitor.mfu) == (None, None)


def test_under_errors_for_warnings_the_run_goes_on_and_the_word_is_printed(tmp_path, capfd):
    (tmp_path / "file").write_text("in the way")
    model = nn.Linear(64, 64)
    below = tmp_path / "file" / "below"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Monitor(model, peak_flops=1e18, jsonl=below, report=below, metrics_port=0, target_loss=1.0) as monitor:
            for step in range(12):
                with monitor.step() as figures:
                    torch.cdist(model(torch.randn(1, 64)), torch.zeros(1, 64))
                    figures.update(loss=math.nan if step else 1.0, text="words", steps=3, loss_a=1, **{"loss a": 1})
            monitor.count_flops(lambda: model(torch.randn(1, 64)))
            memory = torch.ones(8 * 2**20)  # 32 MiB
            monitor.check()
            del memory
        with monitor.step():
            pass
    assert monitor.steps == 12
    printed = capfd.readouterr().err.splitlines()
    assert len(printed) == len(set(printed))
    for word in (
        "JSON lines in", "aten::_cdist_forward", "the loss became nan", "'text' is left out", "'steps' is left out",
        "'loss a' is left out", "MFU is 0%", "times the parameters", "writing the report", "is closed",
    ):  # fmt: skip
        assert sum(word in line for line in printed if line.startswith("MonitorWarning: ")) == 1, word
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert count_flops(lambda: torch.cdist(torch.ones(2, 2), torch.ones(2, 2))) is None
    assert "aten::_cdist_forward" in capfd.readouterr().err


def test_two_monitors_at_a_time():
    models = nn.Linear(8, 4), nn.Linear(16, 4)
    with quiet_monitor(models[0]) as one, quiet_monitor(models[1]) as other:
        for _ in range(2):
            with one.step():
                models[0](torch.randn(3, 8))
                with other.step():
                    models[1](torch.randn(3, 16))
    assert other.flops.executed == 2 * 3 * 16 * 4
    assert one.flops.executed == 2 * 3 * 8 * 4 + other.flops.executed  # its step holds the other's
    assert one.steps == other.steps == 2


def test_memory_is_that_of_each_monitors_time():
    model = nn.Linear(2, 2)
    before = torch.ones(64 * 2**18)  # 64 MiB; from 32 on the C library takes fresh pages, and gives them back
    del before
    first = quiet_monitor(model)
    kept = torch.ones(40 * 2**18)
    second = quiet_monitor(model)
    more = torch.ones(48 * 2**18)
    assert second.peak_bytes - second.parameter_bytes == pytest.approx(48 * 2**20, rel=0.2)
    assert first.peak_bytes - first.parameter_bytes == pytest.approx(88 * 2**20, rel=0.2)
    del kept, more
    assert first.peak_bytes - first.parameter_bytes == pytest.approx(88 * 2**20, rel=0.2)


def test_memory_that_was_freed_before_a_monitor_is_not_taken_for_in_use():
    torch.ones(7 * 2**20)  # freed, glibc takes blocks up to this size from its heap from now on
    blocks = [torch.ones(2**18) for _ in range(64)]  # 64 MiB, in one piece
    pin = torch.ones(2**10)  # above them: the heap can't shrink
    del blocks
    with quiet_monitor(nn.Linear(4, 4)) as monitor:
        memory = torch.ones(6 * 2**20)  # 24 MiB
        assert monitor.peak_bytes > 20 * 2**20
    del memory, pin


def test_what_comes_after_the_end_is_not_the_runs_memory():
    monitor = quiet_monitor()
    monitor.close()
    later = torch.ones(32 * 2**18)
    assert monitor.peak_bytes - monitor.parameter_bytes < 16 * 2**20
    del later


def test_a_resumed_run_counts_on():
    first, second = quiet_monitor(target_loss=1.0), quiet_monitor(target_loss=1.0)
    for loss in (3.0, 2.0):
        first.record(0.5, tokens=4, loss=loss)
    second.load_state_dict(first.state_dict())
    for monitor in (first, second):
        monitor.record(0.5, tokens=4, loss=1.5)
    names = ("steps", "tokens", "total_seconds", "loss", "steps_to_target")
    assert [first.summary()[name] for name in names] == [second.summary()[name] for name in names]


def test_a_curve_stays_short_and_keeps_its_mean():
    curve = Curve(points=8)
    for step in range(1, 1025):
        curve.add(step, float(step))
    assert 4 <= len(curve.values) == len(curve.steps) < 8
    assert curve.steps[-1] == 1024
    assert curve.steps == sorted(curve.steps)
    assert sum(curve.values) / len(curve.values) == 512.5


def test_a_budget_opens_when_enough_time_has_passed():
    budget = Budget(0.1)
    assert budget.open
    with budget.spend():
        torch.ones(1000).sum()
    assert not budget.open
    budget.earn(1000.0)
    assert budget.open


def test_monitor_is_part_of_the_package():
    assert torch_sluice.Monitor is Monitor
