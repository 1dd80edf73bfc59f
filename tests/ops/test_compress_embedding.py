"""Embeddings in 8 bits: how close they are, which are taken, and that they are saved."""

import pytest
import torch
from torch import nn

import torch_sluice
from torch_sluice.compress.embedding import QuantizedEmbedding

pytest.importorskip("torch_pruning", reason="pip install 'torch-sluice[compress]'")


class Classifier(nn.Module):
    def __init__(self, rows=4096, width=32, **options):
        super().__init__()
        self.table = nn.Embedding(rows, width, **options)
        self.hidden = nn.Linear(width, 64)
        self.head = nn.Linear(64, 8)

    def forward(self, ids):
        return self.head(self.hidden(self.table(ids).mean(1)).relu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_element_is_within_half_a_step(dtype):
    table = nn.Embedding(100, 48, dtype=dtype)
    with torch.no_grad():
        table.weight[3] = 0
        table.weight[4] *= 1e-30
    layer = QuantizedEmbedding.from_float(table)
    ids = torch.tensor([[0, 3], [4, 99]])
    out, wanted = layer(ids), table(ids)
    assert out.shape == wanted.shape
    assert out.dtype == dtype
    step = wanted.float().abs().amax(-1, keepdim=True) / 127
    slack = 0.51 if dtype == torch.float32 else 1.1  # bfloat16 has 8 bits itself
    assert ((out.float() - wanted.float()).abs() <= slack * step).all()
    assert (out[0, 1] == 0).all()


def test_compress_takes_a_large_table_and_saves_it(tmp_path):
    torch.manual_seed(0)
    model = Classifier()
    ids = torch.randint(4096, (16, 12))
    small = torch_sluice.compress(model, ids[:1], [(ids, None)], keep=0.9, prune=False, progress=False)
    assert isinstance(small.table, QuantizedEmbedding)
    assert small.compression_report.bytes_after < 0.45 * small.compression_report.bytes_before
    assert ("table", "quantized") in {(layer.name, layer.action) for layer in small.compression_report.layers}
    torch_sluice.compress.save(small, tmp_path / "small.pt")
    again = torch_sluice.compress.load(tmp_path / "small.pt", Classifier)
    assert torch.equal(again(ids), small(ids))
    exported = torch.export.export(small, (ids,)).module()
    assert torch.allclose(exported(ids), small(ids))


@pytest.mark.parametrize(
    ("model", "reason"),
    [(Classifier(rows=64), "its table is small"), (Classifier(max_norm=1.0), "it renormalises its rows")],
)
def test_others_stay_and_the_report_says_why(model, reason):
    ids = torch.randint(64, (8, 12))
    small = torch_sluice.compress(model, ids[:1], [(ids, None)], keep=0.5, progress=False)
    assert type(small.table) is nn.Embedding
    said = {layer.name: layer.reason for layer in small.compression_report.layers if layer.action == "float"}
    assert said["table"] == reason
