"""The callbacks, under the real Trainers of transformers and Lightning."""

import json
import os
import socket
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.data import Dataset

from torch_sluice.monitor import Monitor

transformers = pytest.importorskip("transformers")
LIMITS = dict(peak_flops=1e9, mfu_limit=None, memory_ratio_limit=None)


class Numbers(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return {"x": torch.full((4,), float(index)), "labels": torch.tensor([0.5])}


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x, labels=None):
        return {"loss": nn.functional.mse_loss(self.layer(x / 24), labels)}


@pytest.fixture
def train_with_transformers(tmp_path):
    """Trains 3 steps of 2 micro-batches of 4 with the callback; returns it."""
    from transformers import Trainer, TrainingArguments

    def train(callback, **options):
        options = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", **options}
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, gradient_accumulation_steps=2,
            report_to=[], use_cpu=True, disable_tqdm=True, **options,
        )  # fmt: skip
        trainer = Trainer(Regression(), arguments, train_dataset=Numbers(), callbacks=[callback])
        trainer.train()
        return trainer

    return train


def test_transformers(train_with_transformers, tmp_path):
    from torch_sluice.monitor.hugging_face import MonitorCallback

    callback = MonitorCallback(jsonl=tmp_path / "steps.jsonl", target_loss=100.0, **LIMITS)
    trainer = train_with_transformers(callback)
    monitor = callback.monitor
    assert monitor.closed
    assert monitor.steps == 3
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [line["loss"] for line in lines] == logged
    assert len(logged) == 3
    assert all("learning_rate" in line for line in lines)
    assert monitor.steps_to_target == 1
    # Two micro-batches of 4: the layer, and its gradient in the weights.
    assert monitor.flops.executed == 2 * 2 * (2 * 4 * 4 * 1)


def test_transformers_resumed_with_a_monitor_of_ones_own(train_with_transformers):
    from torch_sluice.monitor.hugging_face import MonitorCallback

    train_with_transformers(MonitorCallback(**LIMITS), max_steps=2, save_strategy="steps", save_steps=2)
    from transformers import Trainer

    with Monitor(nn.Linear(2, 2), **LIMITS) as monitor:
        callback = MonitorCallback(monitor)
        original, Trainer.train = Trainer.train, lambda self: original(self, resume_from_checkpoint=True)
        try:
            train_with_transformers(callback)
        finally:
            Trainer.train = original
        assert monitor.steps == 3
        assert not monitor.closed


class OutOfMemory(Regression):
    """Fails as a device does that has too little memory, in its first steps or a later one."""

    def __init__(self, most=4, calls=0):
        super().__init__()
        self.most, self.calls = most, calls  # calls that go well whatever their size

    def forward(self, x, labels=None):
        self.calls -= 1
        loss = super().forward(x, labels)
        if len(x) > self.most and self.calls < 0:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return loss


def no_mode_is_left():
    compiled = torch.compile(torch.sin, backend="eager", fullgraph=True)  # raises where torch believes in a mode
    return _get_current_dispatch_mode_stack() == [] and bool(compiled(torch.zeros(1)) == 0)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def open_files():
    return sorted(os.readlink(f"/proc/self/fd/{file}") for file in os.listdir("/proc/self/fd") if _is_open(file))


def _is_open(file):
    return os.path.exists(f"/proc/self/fd/{file}")


@pytest.mark.parametrize("calls", [0, 2], ids=["first step", "third step"])
def test_transformers_begins_again_with_smaller_batches(tmp_path, calls):
    """``auto_find_batch_size``: several begins without an end, of which the monitor keeps nothing."""
    from transformers import Trainer, TrainingArguments

    from torch_sluice.monitor.hugging_face import MonitorCallback

    lines, port = tmp_path / "steps.jsonl", free_port()
    callback = MonitorCallback(
        jsonl=lines, metrics_port=port, log_dir=tmp_path / "board", report=tmp_path / "run.html", **LIMITS
    )
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=8, auto_find_batch_size=True, max_steps=4,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_steps=1,
    )  # fmt: skip
    model = OutOfMemory(most=6, calls=calls)
    before = threading.active_count()
    Trainer(model, arguments, train_dataset=Numbers(), callbacks=[callback]).train()
    assert model.calls < calls - 4  # it did fail, and go on
    monitor = callback.monitor
    assert monitor.closed
    assert monitor.steps == 4
    size = monitor.flops_per_step // (2 * 2 * 4)  # of a batch: forward, and the gradient of the weights
    assert 0 < size <= 6
    assert no_mode_is_left()
    steps = [json.loads(line)["step"] for line in lines.read_text().splitlines()]
    assert steps[-4:] == [1, 2, 3, 4]
    assert threading.active_count() == before
    assert not any(str(tmp_path) in name for name in open_files())
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize("fails_in", [1, 3])
def test_transformers_that_failed_is_begun_again_with_the_same_callback(train_with_transformers, fails_in, monkeypatch):
    from torch_sluice.monitor.hugging_face import MonitorCallback

    callback, calls = MonitorCallback(metrics_port=free_port(), **LIMITS), 0
    forward = Regression.forward

    def fail(self, x, labels=None):
        nonlocal calls
        calls += 1
        if calls == 2 * fails_in:  # in its second micro-batch
            raise ZeroDivisionError
        return forward(self, x, labels)

    monkeypatch.setattr(Regression, "forward", fail)
    with pytest.raises(ZeroDivisionError):
        train_with_transformers(callback)
    failed = callback.monitor
    train_with_transformers(callback)
    assert failed.closed
    assert failed.steps == fails_in - 1
    assert callback.monitor is not failed
    assert callback.monitor.steps == 3
    assert callback.monitor.flops.executed == 2 * 2 * (2 * 4 * 4 * 1)
    assert no_mode_is_left()


def test_transformers_that_failed_goes_on_with_a_monitor_of_ones_own(train_with_transformers, monkeypatch):
    from torch_sluice.monitor.hugging_face import MonitorCallback

    def fail(self, x, labels=None):
        raise ZeroDivisionError

    with Monitor(nn.Linear(2, 2), **LIMITS) as monitor:
        callback = MonitorCallback(monitor)
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(Regression, "forward", fail)
            train_with_transformers(callback)
        train_with_transformers(callback)
        assert (monitor.steps, monitor.closed) == (3, False)
    assert no_mode_is_left()


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")
    from torch_sluice.monitor.lightning import MonitorCallback

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.seen = Regression(), []

        def training_step(self, batch):
            loss = self.model(**batch)["loss"]
            self.seen.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    callback = MonitorCallback(jsonl=tmp_path / "steps.jsonl", **LIMITS)
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=2, callbacks=[callback], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(Numbers(), batch_size=5))  # 5 batches: the last window has one
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert callback.monitor.closed
    assert callback.monitor.steps == len(lines) == trainer.global_step == 3
    one, two, three, four, _ = module.seen
    assert [line["loss"] for line in lines[:2]] == pytest.approx([(one + two) / 2, (three + four) / 2])
    assert callback.monitor.flops.executed == 2 * 2 * (2 * 5 * 4 * 1)


def test_lightning_that_fails_leaves_nothing_behind():
    lightning = pytest.importorskip("lightning.pytorch")
    from torch_sluice.monitor.lightning import MonitorCallback

    class Module(lightning.LightningModule):
        def training_step(self, batch):
            raise ZeroDivisionError

        def configure_optimizers(self):
            return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)

    callback = MonitorCallback(**LIMITS)
    trainer = lightning.Trainer(
        max_epochs=1, callbacks=[callback], accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Module(), torch.utils.data.DataLoader(Numbers(), batch_size=4))
    assert callback.monitor.closed
    assert no_mode_is_left()


def test_lightning_that_was_told_no_end_is_begun_again():
    lightning = pytest.importorskip("lightning.pytorch")
    from torch_sluice.monitor.lightning import MonitorCallback

    module, trainer = lightning.LightningModule(), lightning.Trainer(accelerator="cpu", logger=False)
    callback = MonitorCallback(metrics_port=free_port(), **LIMITS)
    for _ in range(2):
        callback.on_train_start(trainer, module)
        callback.on_train_batch_start(trainer, module, None, 0)
    callback.on_train_end(trainer, module)
    assert no_mode_is_left()


@pytest.mark.parametrize("module", ["hugging_face", "lightning"])
def test_a_monitor_and_arguments_for_one_are_too_much(module):
    if module == "lightning":
        pytest.importorskip("lightning.pytorch")
    callbacks = __import__(f"torch_sluice.monitor.{module}", fromlist=["MonitorCallback"])
    with Monitor(nn.Linear(2, 2), **LIMITS) as monitor, pytest.raises(ValueError, match="together with target_loss"):
        callbacks.MonitorCallback(monitor, target_loss=1.0)
