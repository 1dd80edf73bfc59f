"""Training by transformers, Lightning, Fabric and accelerate, with the line that opens a session or without it.

Each function trains ``EPOCHS`` epochs of 18 micro-batches in windows of 4, clips to a small norm, and returns the
weights that came out. ``policy`` None: no session.
"""

import contextlib

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from support.accumulate_training import session_or_not, values

EPOCHS, BATCHES, EVERY, LIMIT = 2, 18, 4, 0.05


class Words(Dataset):
    """Rows of six tokens, of which a different number has a label."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(0, 16, (6,), generator=generator)
        labels[: index % 5] = -100
        return {"input_ids": torch.randint(0, 16, (6,), generator=generator), "labels": labels}


class Language(nn.Module):
    """The loss is the mean over labels: of this micro-batch, or of ``num_items_in_batch`` where that is known."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.hidden, self.head = nn.Embedding(16, 32), nn.Linear(32, 64), nn.Linear(64, 16)

    def forward(self, input_ids, labels=None, num_items_in_batch=None):
        logits = self.head(self.hidden(self.embedding(input_ids)).tanh())
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        count = (labels != -100).sum() if num_items_in_batch is None else num_items_in_batch
        return {"loss": total / count}


def make():
    model = Language()
    return model, torch.optim.AdamW(model.parameters(), 1e-2)


def loader(ranks=1):
    return DataLoader(Words(2 * BATCHES * ranks), batch_size=2)


def with_transformers(policy, folder, ranks=1, **options):
    from transformers import Trainer, TrainingArguments

    model, optimizer = make()
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, gradient_accumulation_steps=EVERY, report_to=[],
        max_grad_norm=LIMIT, num_train_epochs=EPOCHS, use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_steps=1, ddp_backend="gloo" if ranks > 1 else None, **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Words(2 * BATCHES * ranks), optimizers=(optimizer, None))
    with session_or_not(model, optimizer, None, policy) as session:
        trainer.train()
    assert session is None or session.steps == trainer.state.global_step == EPOCHS * 5
    norms = [torch.tensor(entry["grad_norm"]) for entry in trainer.state.log_history if "grad_norm" in entry]
    assert len(norms) == EPOCHS * 5
    assert all(norm > LIMIT for norm in norms)
    return [*values(model), torch.stack(norms)]


def with_lightning(policy, folder, ranks=1, **options):
    import lightning.pytorch as lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.optimizer = make()

        def training_step(self, batch):
            return self.model(**batch)["loss"]

        def configure_optimizers(self):
            return self.optimizer

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accumulate_grad_batches=EVERY, gradient_clip_val=LIMIT, accelerator="cpu", logger=False,
        devices=ranks, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=str(folder), **options,
    )  # fmt: skip
    with session_or_not(module, module.optimizer, None, policy) as session:
        trainer.fit(module, loader(ranks))
    assert session is None or session.steps == trainer.global_step == EPOCHS * 5
    return values(module)


def shard(model, mesh):
    """FSDP2, as Fabric's strategy is told to."""
    from torch.distributed.fsdp import fully_shard

    for layer in (model.hidden, model.head, model):
        fully_shard(layer, mesh=mesh["data_parallel"])
    return model


def with_fabric(policy, folder, ranks=1, **options):
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=ranks, **options)
    fabric.launch()
    bare, optimizer = make()
    model, optimizer = fabric.setup(bare, optimizer)
    data = fabric.setup_dataloaders(loader(ranks))
    assert len(data) == BATCHES
    with session_or_not(model, optimizer, None, policy) as session:
        for _ in range(EPOCHS):
            for i, batch in enumerate(data):
                last = (i + 1) % EVERY == 0 or i + 1 == len(data)
                with fabric.no_backward_sync(model, enabled=not last):
                    fabric.backward(model(**batch)["loss"] / EVERY)
                if last:
                    fabric.clip_gradients(model, optimizer, max_norm=LIMIT)
                    optimizer.step()
                    optimizer.zero_grad()
    assert session is None or session.steps == EPOCHS * 5
    return values(model)


def with_accelerate(policy, folder, ranks=1, accumulate=True, every=None, **options):
    """``accumulate``: in ``accelerator.accumulate()``, step and zero_grad after each micro-batch; else by hand. With
    ``every`` the session holds steps instead, which makes no short windows: the plain loop has none either then."""
    from accelerate import Accelerator

    steps = EVERY if accumulate else 1
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=steps, **options)
    bare, optimizer = make()
    model, optimizer, data = accelerator.prepare(bare, optimizer, loader(ranks))
    with session_or_not(model, optimizer, every, policy) as session:
        for _ in range(EPOCHS):
            for i, batch in enumerate(data):
                last = (i + 1) % EVERY == 0 or (i + 1 == len(data) and every is None)
                if every and i >= BATCHES // EVERY * EVERY:
                    break
                with accelerator.accumulate(model) if accumulate else contextlib.nullcontext():
                    held = every and policy
                    accelerator.backward(model(**batch)["loss"] / (1 if accumulate or held else EVERY))
                    if accelerator.sync_gradients and (accumulate or last or held):
                        accelerator.clip_grad_norm_(model.parameters(), LIMIT)
                    if accumulate or last or held:
                        optimizer.step()
                        optimizer.zero_grad()
    assert session is None or session.steps == EPOCHS * (4 if every else 5)
    return values(model)
