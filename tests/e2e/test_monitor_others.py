"""What real loops give a monitor: numbers of other libraries, strange names, processes that fork."""

import contextlib
import decimal
import fractions
import json
import os
import signal
import urllib.request

import numpy
import pytest
import torch
from torch import nn

from torch_sluice import Monitor
from torch_sluice.monitor.limits import MonitorWarning

HUGE = 10**400  # more than a float holds


def make(**options):
    return Monitor(nn.Linear(4, 4), peak_flops=1e10, mfu_limit=None, memory_ratio_limit=None, **options)


def scrape(monitor):
    with urllib.request.urlopen(f"http://127.0.0.1:{monitor.metrics_port}/metrics", timeout=10) as answer:
        return answer.read().decode()


def lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


GOOD = {
    "float32 of NumPy": numpy.float32(1.5),
    "int64 of NumPy": numpy.int64(3),
    "bool of NumPy": numpy.bool_(True),
    "array of one": numpy.ones(1),
    "tensor": torch.tensor(1.5, dtype=torch.bfloat16),
    "tensor with a graph": torch.ones((), requires_grad=True),
    "decimal": decimal.Decimal("1.5"),
    "fraction": fractions.Fraction(1, 2),
    "bool": True,
    "large integer": 2**70,
}
BAD = {
    "huge": HUGE,
    "minus huge": -HUGE,
    "huge fraction": fractions.Fraction(HUGE),
    "complex of NumPy": numpy.complex64(1),
    "complex tensor": torch.tensor(1 + 2j),
    "tensor of many": torch.ones(3),
    "on no device": torch.ones((), device="meta"),
    "none": None,
    "list": [1],
}


@pytest.mark.filterwarnings("error::UserWarning", "default::torch_sluice.monitor.limits.MonitorWarning")
def test_a_figure_that_is_no_number_costs_no_other_figure(tmp_path):
    path = tmp_path / "steps.jsonl"
    with make(jsonl=path, metrics_port=0, log_dir=tmp_path / "events") as monitor:
        with pytest.warns(MonitorWarning) as warned, monitor.step() as figures:
            figures.update(GOOD | BAD)
        text = scrape(monitor)
    for name in BAD:
        assert any(f"the figure '{name}' is left out" in str(one.message) for one in warned)
    assert len(warned) == len(BAD)
    (line,) = lines(path)
    for name, value in GOOD.items():
        assert line[name] == float(value.item() if hasattr(value, "item") else value)
        assert f"torch_sluice_{name.replace(' ', '_')}{{" in text
    assert not BAD.keys() & line.keys()
    assert list((tmp_path / "events").iterdir())


@pytest.mark.parametrize("name", ["loss", "density", "half_share"])
def test_a_huge_figure_under_a_known_name_is_left_out(name, tmp_path):
    path = tmp_path / "steps.jsonl"
    with make(jsonl=path, metrics_port=0) as monitor:
        with pytest.warns(MonitorWarning, match=f"'{name}' is left out"), monitor.step() as figures:
            figures[name] = HUGE
        scrape(monitor)
        json.dumps(monitor.summary())
    assert len(lines(path)) == 1


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [(numpy.int64(5), 5), (torch.tensor(5), 5), (torch.tensor(2.5), 2.5), (None, 0), ("many", 0), (-3, 0), (HUGE, 0),
     (float("nan"), 0), (torch.ones(2), 0)],
)  # fmt: skip
def test_tokens_of_any_kind(tokens, expected, tmp_path):
    path = tmp_path / "steps.jsonl"
    with make(jsonl=path, metrics_port=0) as monitor:
        with contextlib.nullcontext() if expected else pytest.warns(MonitorWarning, match="tokens is"):
            for _ in range(2):
                monitor.begin_step()
                monitor.end_step(tokens)
        assert f'torch_sluice_tokens_total{{monitor="Linear"}} {2.0 * expected}' in scrape(monitor)
    assert [line["tokens"] for line in lines(path)] == [expected] * 2
    assert json.loads(json.dumps(monitor.summary()))["tokens"] == 2 * expected


def test_seconds_of_any_kind(tmp_path):
    path = tmp_path / "steps.jsonl"
    with make(jsonl=path) as monitor:
        monitor.record(numpy.float32(0.5))
        monitor.record(torch.tensor(0.5))
        with pytest.warns(MonitorWarning, match=r"seconds is -1\.0"):
            monitor.record(-1.0)
        for odd in (float("nan"), float("inf"), None, "long", HUGE):
            monitor.record(odd)
    assert [line["seconds"] for line in lines(path)] == [0.5, 0.5]
    assert json.loads(json.dumps(monitor.summary()))["total_seconds"] == 1.0


def test_names_that_are_no_text(tmp_path):
    path = tmp_path / "steps.jsonl"
    with make(name="a\ud800", jsonl=path, metrics_port=0, report=tmp_path / "run.html") as monitor:
        with monitor.step() as figures:
            figures["b\ud800"] = 1.0
            figures['quoted "c"\n'] = 2.0
        text = scrape(monitor)
    assert 'torch_sluice_b_{monitor="a?"} 1.0' in text
    assert 'torch_sluice_quoted__c__{monitor="a?"} 2.0' in text
    assert lines(path)[0]["b?"] == 1.0
    assert (tmp_path / "run.html").exists()


def test_a_forked_process_can_close_the_monitor():
    with make(metrics_port=0) as monitor:
        with monitor.step():
            pass
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # which ends it where it waits for what is not there
            monitor.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert "torch_sluice_steps_total" in scrape(monitor)


@pytest.mark.parametrize(
    ("name", "value"),
    [("peak_flops", "fast"), ("target_loss", "low"), ("metrics_port", True), ("jsonl", 5),
     ("metrics_host", None), ("jsonl", "a\0b"), ("report", 3), ("log_dir", 5)],
)  # fmt: skip
def test_arguments_that_are_something_else_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        Monitor(nn.Linear(4, 4), **{name: value})


def test_arguments_may_be_numbers_of_numpy():
    Monitor(nn.Linear(4, 4), target_loss=numpy.float32(1), metrics_port=numpy.int64(0)).close()


@pytest.mark.parametrize(
    "change",
    [lambda state: None, lambda state: {}, lambda state: state | {"loss": None}, lambda state: state | {"steps": "x"},
     lambda state: state | {"total_seconds": float("nan")}, lambda state: state | {"tokens": None}],
)  # fmt: skip
def test_a_state_of_something_else_is_refused_whole(change):
    with make() as monitor:
        monitor.record(1.0, loss=2.0)
        state = monitor.state_dict()
        monitor.record(1.0, loss=2.0)
        with pytest.raises(ValueError, match="state"):
            monitor.load_state_dict(change(state))
        assert (monitor.steps, monitor.loss.value) == (2, 2.0)
        monitor.load_state_dict(state)
        assert monitor.steps == 1
