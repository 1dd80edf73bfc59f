"""Where the figures go: JSON lines, TensorBoard, a Prometheus port; and what happens when they cannot."""

import gc
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
import warnings
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from torch_sluice.monitor import Monitor, MonitorWarning
from torch_sluice.monitor.outputs import Output
from torch_sluice.monitor.outputs.json_lines import keep_lines_up_to


@pytest.fixture
def make_monitor():
    """Makes monitors without limits, and closes them."""
    made = []

    def make(model=None, **options):
        options = {"peak_flops": 1e9, "mfu_limit": None, "memory_ratio_limit": None, **options}
        made.append(Monitor(nn.Linear(2, 2) if model is None else model, **options))
        return made[-1]

    yield make
    for monitor in made:
        monitor.close()


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        return response.read().decode()


def samples_of(text):
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_json_lines_are_there_when_the_step_has_ended(make_monitor, tmp_path):
    path = tmp_path / "folder" / "steps.jsonl"
    monitor = make_monitor(jsonl=path, name="one")
    monitor.record(0.5, tokens=8, loss=2.0)
    with pytest.warns(MonitorWarning):
        monitor.record(0.5, tokens=8, loss=math.nan)
    first, second = read_lines(path)
    assert (first["step"], first["monitor"], first["seconds"], first["loss"]) == (1, "one", 0.5, 2.0)
    assert first["tokens_per_second"] == 16.0
    assert (second["step"], second["loss"]) == (2, None)


def test_json_lines_go_on_after_a_resume_and_mend_a_torn_line(make_monitor, tmp_path):
    path = tmp_path / "steps.jsonl"
    make_monitor(jsonl=path).record(0.5)
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    monitor = make_monitor(jsonl=path)
    monitor.steps = 1
    monitor.record(0.25)
    assert [(line["step"], line["seconds"]) for line in read_lines(path)] == [(1, 0.5), (2, 0.25)]


def test_json_lines_after_the_step_that_is_resumed_are_forgotten(tmp_path):
    path = tmp_path / "steps.jsonl"
    keep_lines_up_to(path, 3)
    assert not path.exists()
    lines = ['{"step": 3, "monitor": "one"}', "not JSON", '{"step": 4}', "[]", '{"step": 2, "monitor": "two"}']
    path.write_text("\n".join(lines) + "\n")
    keep_lines_up_to(path, 3)
    assert path.read_text().splitlines() == [line for line in lines if line != '{"step": 4}']
    assert list(tmp_path.iterdir()) == [path]


def test_json_lines_survive_a_kill(tmp_path):
    path = tmp_path / "steps.jsonl"
    program = (
        "import torch_sluice, torch, sys\n"
        "monitor = torch_sluice.Monitor(torch.nn.Linear(2, 2), jsonl=sys.argv[1], mfu_limit=None)\n"
        "while True: monitor.record(0.01, loss=1.0); print('.', flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
    for _ in range(50):
        process.stdout.readline()
    process.kill()
    process.wait()
    process.stdout.close()
    assert path.read_bytes().endswith(b"\n")
    lines = read_lines(path)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) >= 50


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_said_once_and_the_run_goes_on(make_monitor):
    monitor = make_monitor(jsonl="/dev/full")
    with pytest.warns(MonitorWarning, match="JSON lines in '/dev/full': .* the run goes on: No space left") as caught:
        for _ in range(3):
            monitor.record(0.1)
    assert len(caught) == 1
    assert monitor.steps == 3


def test_a_line_that_the_disk_takes_half_of_is_taken_back(make_monitor, tmp_path, monkeypatch):
    path = tmp_path / "steps.jsonl"
    monitor = make_monitor(jsonl=path)
    monitor.record(0.1)
    write = os.write
    monkeypatch.setattr("torch_sluice.monitor.outputs.json_lines.os.write", lambda file, data: write(file, data[:9]))
    with pytest.warns(MonitorWarning, match="No space left"):
        monitor.record(0.2)
    monkeypatch.undo()
    monitor.record(0.3)
    assert [line["seconds"] for line in read_lines(path)] == [0.1, 0.3]


@pytest.mark.parametrize("output", ["jsonl", "log_dir"])
def test_a_path_where_nothing_can_be_written(make_monitor, tmp_path, output):
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(MonitorWarning, match="figures are being lost, the run goes on") as caught:
        monitor = make_monitor(**{output: tmp_path / "file" / "below"})
        for _ in range(3):
            monitor.record(0.1)
        monitor.close()
    assert len(caught) == 1
    assert monitor.steps == 3


def test_tensorboard_has_the_scalars(make_monitor, tmp_path):
    monitor = make_monitor(log_dir=tmp_path)
    for loss in (3.0, 2.0):
        monitor.record(50.0, tokens=8, loss=loss)
    monitor.close()
    scalars = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in scalars.Scalars("loss")] == [3.0, 2.0]
    assert [event.step for event in scalars.Scalars("tokens_per_second")] == [1, 2]


@pytest.mark.parametrize(("free", "written"), [(0.0, [1, 5]), (3600.0, [1, 2, 3, 4, 5])])
def test_fewer_steps_are_written_where_writing_would_take_long(free, written):
    class Steps(list):
        def write(self, step, figures):
            self.append(step)

    steps = Steps()
    output = Output("steps", lambda: steps, share=1e-9, free=free)
    for step, seconds in enumerate((1e-9, 1e-9, 1e-9, 1e-9, 1e12), 1):
        output.write(step, seconds, {})
    assert steps == written


def test_prometheus_shows_the_last_step(make_monitor):
    monitor = make_monitor(metrics_port=0, name="one")
    assert samples_of(scrape(monitor.metrics_port))["torch_sluice_steps_total", "one"] == 0
    monitor.count_flops(lambda: None)
    for seconds, loss in ((0.5, 3.0), (0.25, 2.0)):
        monitor.record(seconds, tokens=8, **{"loss": loss, "odd-name": 1.5})
    text = scrape(monitor.metrics_port)
    samples = samples_of(text)
    assert samples["torch_sluice_steps_total", "one"] == 2
    assert samples["torch_sluice_tokens_total", "one"] == 16
    assert samples["torch_sluice_seconds_total", "one"] == 0.75
    assert samples["torch_sluice_loss", "one"] == 2.0
    assert samples["torch_sluice_mfu", "one"] == 0
    assert samples["torch_sluice_step_seconds", "one", "0.95"] == 0.5
    assert samples["torch_sluice_odd_name", "one"] == 1.5
    for name in {name.removesuffix("_total") for name, *_ in samples}:
        assert name.startswith("torch_sluice_")
        assert len(re.findall(rf"^# HELP {name}(_total)? \S", text, re.M)) == 1, name
        assert len(re.findall(rf"^# TYPE {name}(_total)? (gauge|counter)$", text, re.M)) == 1, name


def assert_no_series_twice(text):
    series = [line.rsplit(" ", 1)[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(series) == len(set(series))
    metrics = re.findall(r"^# TYPE (\S+)", text, re.M)
    assert len(metrics) == len(set(metrics))


def test_figures_that_become_one_metric_are_shown_once(make_monitor, tmp_path):
    path = tmp_path / "steps.jsonl"
    monitor = make_monitor(metrics_port=0, name="one", jsonl=path)
    with pytest.warns(MonitorWarning) as caught:
        for step in (1.0, 2.0):
            monitor.record(0.5, **{"loss/train": step, "loss_train": 10 * step, "loss train": 20 * step})
        monitor.record(0.5, **{"loss_train": 30.0})  # alone, it is still not the other
    assert [re.search("the figure '(.*?)' is left out of the Prometheus", str(w.message))[1] for w in caught] == [
        "loss_train", "loss train",
    ]  # fmt: skip
    assert "it would be that of 'loss/train'" in str(caught[0].message)
    text = scrape(monitor.metrics_port)
    assert_no_series_twice(text)
    assert ("torch_sluice_loss_train", "one") not in samples_of(text)
    monitor.record(0.5, **{"loss_train": 30.0, "loss/train": 3.0})
    assert samples_of(scrape(monitor.metrics_port))["torch_sluice_loss_train", "one"] == 3.0
    assert read_lines(path)[0]["loss_train"] == 10.0  # a line has both


def test_the_monitors_own_names_are_not_for_figures(make_monitor):
    monitor = make_monitor(metrics_port=0, name="one")
    theirs = ["steps", "step", "time", "monitor", "step_seconds", "mfu", "flops", "peak_bytes", "memory_ratio"]
    theirs += ["steps_total", "tokens_total", "seconds_total"]
    also = ["steps-total", "tokens/total", "seconds.total", "peak bytes", "half share", "tokens per second"]
    with pytest.warns(MonitorWarning) as caught:
        for _ in range(2):
            monitor.record(0.5, tokens=8, loss=1.0, **dict.fromkeys([*theirs, *also], 77.0))
    left_out = [str(warning.message) for warning in caught]
    for name in theirs:
        assert f"the figure {name!r} is left out of the monitor: that name is the monitor's own" in left_out
        assert name not in monitor.latest
    for name in also:
        assert any(message.startswith(f"the figure {name!r} is left out of the Prometheus") for message in left_out)
    assert len(left_out) == len(theirs) + len(also)
    text = scrape(monitor.metrics_port)
    assert_no_series_twice(text)
    assert 77.0 not in samples_of(text).values()
    assert samples_of(text)["torch_sluice_steps_total", "one"] == 2


def test_without_a_port_no_metric_is_missed(make_monitor):
    monitor = make_monitor()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        monitor.record(0.5, **{"loss/train": 1.0, "loss_train": 2.0})
    assert caught == []
    assert (monitor.latest["loss/train"], monitor.latest["loss_train"]) == (1.0, 2.0)


def test_two_monitors_may_have_figures_that_become_one_metric(make_monitor):
    first = make_monitor(metrics_port=0, name="one")
    second = make_monitor(metrics_port=first.metrics_port, name="two")
    first.record(0.5, **{"loss/train": 1.0})
    second.record(0.5, **{"loss_train": 2.0})
    text = scrape(first.metrics_port)
    assert_no_series_twice(text)
    samples = samples_of(text)
    assert (samples["torch_sluice_loss_train", "one"], samples["torch_sluice_loss_train", "two"]) == (1.0, 2.0)


def test_a_monitor_that_was_dropped_frees_its_name(make_monitor):
    first = make_monitor(metrics_port=0, name="one")
    port = first.metrics_port
    dropped = Monitor(nn.Linear(2, 2), metrics_port=port, name="two")
    dropped.record(0.5, loss=1.0)
    del dropped
    gc.collect()
    assert {key[1] for key in samples_of(scrape(port))} == {"one"}
    make_monitor(metrics_port=port, name="two").record(0.5, loss=2.0)
    assert samples_of(scrape(port))["torch_sluice_loss", "two"] == 2.0


def test_prometheus_listens_on_loopback_alone(make_monitor):
    port = make_monitor(metrics_port=0).metrics_port
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening


def test_monitors_share_a_port_under_their_names(make_monitor):
    first = make_monitor(metrics_port=0, name="one")
    second = make_monitor(metrics_port=first.metrics_port, name="two")
    first.record(0.5, loss=1.0)
    second.record(0.5, loss=2.0)
    samples = samples_of(scrape(first.metrics_port))
    assert (samples["torch_sluice_loss", "one"], samples["torch_sluice_loss", "two"]) == (1.0, 2.0)
    with pytest.raises(ValueError, match="name is 'two', which another monitor on port .* has"):
        make_monitor(metrics_port=first.metrics_port, name="two")
    first.close()
    assert {key[1] for key in samples_of(scrape(second.metrics_port))} == {"two"}


def test_a_port_in_use_is_refused_with_its_number(make_monitor, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"metrics_port is {port} on metrics_host '127.0.0.1'.*in use; choose"):
            make_monitor(metrics_port=port)


def test_a_host_that_does_not_exist(make_monitor):
    with pytest.raises(ValueError, match="metrics_host '256.0.0.1', where nothing can listen"):
        make_monitor(metrics_port=0, metrics_host="256.0.0.1")


def test_the_port_is_free_again_after_the_end(make_monitor):
    before = threading.active_count()
    monitor = make_monitor(metrics_port=0)
    port = monitor.metrics_port
    scrape(port)
    monitor.close()
    with socket.create_server(("127.0.0.1", port)):
        pass
    assert threading.active_count() == before


def test_ctrl_c_leaves_no_port_and_whole_lines(tmp_path):
    path = tmp_path / "steps.jsonl"
    program = (
        "import torch_sluice, torch, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # which a job in the background starts without\n"
        "with torch_sluice.Monitor(torch.nn.Linear(2, 2), jsonl=sys.argv[1], metrics_port=0, mfu_limit=None) as m:\n"
        "    m.record(0.1); print(m.metrics_port, flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    port = int(process.stdout.readline())
    assert "torch_sluice_steps_total" in scrape(port)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == -signal.SIGINT
    process.stdout.close()
    with socket.create_server(("127.0.0.1", port)):
        pass
    assert [line["step"] for line in read_lines(path)] == [1]


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match="metrics_port is 0, which needs the package prometheus-client"):
        Monitor(nn.Linear(2, 2), metrics_port=0)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="log_dir is .* which needs TensorBoard: pip install tensorboard"):
        Monitor(nn.Linear(2, 2), log_dir=tmp_path)
