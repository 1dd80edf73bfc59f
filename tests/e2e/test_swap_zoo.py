"""One small model of each of a dozen architectures through ``python -m benchmarks.swap_zoo``'s check."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from benchmarks import swap_zoo, zoo

EXACT = (
    "bert", "gpt2", "llama", "mistral", "gemma2", "gpt_oss", "t5", "falcon", "vit", "clip", "whisper", "bart",
    "paligemma", "bridgetower", "modernbert", "swin", "qwen2_vl",
)  # fmt: skip
REFUSED = {
    "bloom": "BloomAttention): it computes attention itself",
    "deepseek_v32": "its forward does something else unless its attn_implementation is",
    "resnet": "without attention that can be swapped",
}


@pytest.mark.parametrize("name", EXACT)
def test_exact(name):
    row = swap_zoo.examine(zoo.find(name))
    assert row["status"] == "exact", row["reason"]
    assert row["calls"] > 0
    assert row["difference"] <= swap_zoo.TOLERANCE
    assert not row["gates"].startswith("error")


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    row = swap_zoo.examine(zoo.find(name))
    assert row["status"] == "refused"
    assert REFUSED[name] in row["reason"]


def test_a_swap_that_changes_something_is_an_error():
    """What the zoo would miss proves nothing."""

    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.mha = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x):
            out = self.mha(x, x, x, need_weights=False)[0]
            return out if type(self.mha) is nn.MultiheadAttention else 1.0001 * out

    draw = lambda *_: torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))  # noqa: E731
    row = swap_zoo.examine(zoo.Entry("wrong", "torch", lambda: (Wrong().eval(), draw)))
    assert row["status"] == "error"
    assert "outputs: 0.0001" in row["reason"]
