"""Training with sparsity under the Trainer of transformers."""

import pytest
import torch

import torch_sluice
from torch_sluice.attention import parameter_groups

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
transformers = pytest.importorskip("transformers")
from torch_sluice.attention.trainer import GateCallback  # noqa: E402

CONFIG = transformers.LlamaConfig(
    vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
)


class Sequences(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        tokens = torch.randint(0, 16, (32,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def train(folder, steps, micro_batches=2, resume=None, **options):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(CONFIG)
    torch_sluice.swap_attention(model, target_density=0.4, window=2)
    callback = GateCallback(**options)
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=steps, per_device_train_batch_size=4 // micro_batches, save_steps=5, report_to=[],
        gradient_accumulation_steps=micro_batches, use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-2))
    trainer = transformers.Trainer(
        model, arguments, train_dataset=Sequences(), optimizers=(optimizer, None), callbacks=[callback]
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, callback.controller


def test_density_falls_and_a_checkpoint_is_continued(tmp_path):
    _, controller = train(tmp_path, 24, gain=2.0)
    assert controller.count == controller.steps == 24
    assert controller.density < 0.6
    assert controller.phase == "hard"
    _, resumed = train(tmp_path, 12, resume=str(tmp_path / "checkpoint-10"), gain=2.0)
    assert resumed.count == 12


def test_the_mean_gate_weighs_the_same_however_many_micro_batches(tmp_path):
    models = [train(tmp_path / str(n), 3, micro_batches=n, gain=20.0, ramp=0.0, rows=0.0)[0] for n in (1, 2)]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    left_alone = train(tmp_path / "0", 3, gain=0.0, ramp=0.0, rows=0.0)[0]
    for (name, pushed), free in zip(models[0].named_parameters(), left_alone.parameters(), strict=True):
        assert "sluice_gate.query_bias" not in name or (pushed < free).all()
