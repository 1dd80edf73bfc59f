"""What compress quantises: weights found by how the running model uses them; why others stay; what fails stays, too."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support.compress_models import call_all_faster
from support.quantized_layers import Conv1D, LowRank, Tied, relative_error
from torch import nn

import torch_sluice
from torch_sluice.compress import QuantizedWeight, quantization, quantize_layer
from torch_sluice.compress.folding import fold_batch_norms
from torch_sluice.compress.layers import stored_bytes
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.uses import float_parameters, watch_uses

OPTIONS = {"policy": "sqnr", "target_sqnr": 30.0, "weight_bits": 8, "group_size": 0}


@pytest.fixture(autouse=True)
def every_layer_is_faster(monkeypatch):
    monkeypatch.setattr(quantization, "_time_in_place", call_all_faster)


def find(model, *inputs, **options):
    """Kinds of the candidates, and reasons of what stays, by name."""
    chosen, stay = quantization.find_candidates(model.eval(), inputs, {**OPTIONS, **options}, Progress(False))
    return {c.name: c.weight.kind for c in chosen}, {decision.name: decision.reason for decision in stay}


class Functional(nn.Module):
    """Weights that no module of torch owns, and one that is read in two ways."""

    def __init__(self):
        super().__init__()
        self.matrix, self.right = nn.Parameter(torch.randn(12, 8)), nn.Parameter(torch.randn(12, 6))
        self.mixed, self.filters = nn.Linear(8, 12), nn.Parameter(torch.randn(4, 1, 3, 3))
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        y = F.linear(x, self.matrix) @ self.right
        z = F.linear(x, self.mixed.weight) + self.mixed.weight.sum(1)
        images = F.conv2d(x.view(-1, 1, 2, 4), weight=self.filters, padding=1)
        return y.sum(-1) + z.sum(-1) + images.sum((1, 2, 3))


def test_functional_calls_are_met_and_another_use_is_named():
    kinds, reasons = find(Functional(), torch.randn(3, 8))
    assert kinds == {"matrix": "linear", "right": "transposed", "filters": "conv2d"}
    assert reasons == {
        "mixed": "its weight is used by sum, which no integer kernel serves",
        "unused": "it is not called for example_inputs by itself"
    }  # fmt: skip


def test_subclasses_and_layers_of_others_are_met():
    model = nn.Sequential(LowRank(16, 12), Conv1D(10, 12), nn.Linear(10, 4))
    kinds, reasons = find(model, torch.randn(3, 16))
    assert kinds == {"0": "linear", "0.down": "linear", "0.up": "linear", "1": "transposed", "2": "linear"}
    assert reasons == {}


class Asking(nn.Module):
    """Asks for the dtype of its weights, as most modelling files of transformers do."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    @property
    def dtype(self):
        return self.conv.weight.dtype

    def forward(self, x):
        x = self.conv(x.to(self.dtype).to(next(self.parameters()).device)).mean((2, 3))
        return self.linear(x.to(self.linear.weight.dtype)) * len(self.linear.weight.shape)


def test_a_model_that_asks_for_its_weights_is_compressed():
    model, x = Asking(), torch.randn(4, 3, 6, 6)
    small = torch_sluice.compress(model, x, [(x, None)] * 4, keep=0.5, prune=False, progress=False)
    assert {type(small.conv.weight), type(small.linear.weight)} == {QuantizedWeight}
    assert type(small.conv) is nn.Conv2d
    with torch.no_grad():
        assert relative_error(small(x), model.eval()(x)) < 0.05


def test_a_tied_table_is_one_candidate():
    torch.manual_seed(0)
    model = Tied()
    assert float_parameters(model)["embed.weight"] == ["embed.weight", "head.weight"]
    kinds, reasons = find(model, torch.arange(6).view(2, 3))
    assert kinds == {"embed": "linear", "hidden": "linear"}
    assert reasons == {}
    ids = torch.randint(300, (8, 5))
    small = torch_sluice.compress(model, ids[:1], [(ids, None)] * 2, keep=0.9, prune=False, progress=False)
    assert small.head.weight is small.embed.weight
    assert type(small.head.weight) is QuantizedWeight
    assert stored_bytes(small) < 0.35 * stored_bytes(model)
    assert list(small.state_dict()) == list(model.state_dict())


class Lookup(nn.Module):
    def __init__(self, rows=4096, width=32, **options):
        super().__init__()
        self.table, self.head = nn.Embedding(rows, width, **options), nn.Linear(width, 8)

    def forward(self, ids):
        return self.head(self.table(ids).mean(1))


def test_a_large_table_is_quantised_for_its_bytes():
    ids = torch.randint(64, (16, 12))
    assert find(Lookup(), ids)[0] == {"table": "rows", "head": "linear"}
    small = torch_sluice.compress(Lookup(), ids[:1], [(ids, None)], keep=0.9, prune=False, progress=False)
    assert stored_bytes(small) < 0.3 * stored_bytes(Lookup())
    for model, reason in (
        (Lookup(rows=64), "its table is small"),
        (Lookup(max_norm=1.0), "its weight is used by renormalisation of its rows, which no integer kernel serves"),
    ):
        assert find(model, ids)[1] == {"table": reason}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda model: model.double(), "its weight is float64"),
        (lambda model: nn.init.constant_(model[0].weight, torch.nan), "its weight has NaN or infinity"),
        (lambda model: quantize_layer(model[0]), "its weight is quantised already"),
    ],
)
def test_what_cannot_be_quantised_stays_with_a_reason(change, reason):
    model = nn.Sequential(nn.Linear(8, 4)).requires_grad_(False)
    change(model)
    kinds, reasons = find(model, torch.randn(2, 8, dtype=model[0].weight.dtype))
    assert (kinds, reasons) == ({}, {"0": reason})


class Speaker(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.cell, self.plain = nn.LSTM(12, 16, 2, bidirectional=True), nn.GRUCell(32, 8), nn.RNN(8, 8)

    def forward(self, x):
        return self.plain(self.cell(self.rnn(x)[0][-1]))[0]


def test_the_matrices_of_a_recurrent_layer_are_one_candidate(tmp_path):
    torch.manual_seed(0)
    model, x = Speaker(), torch.randn(6, 4, 12)
    kinds, reasons = find(model, x)
    assert kinds == {"rnn": "linear", "cell": "linear"}
    assert set(reasons) == {"plain.weight_ih_l0", "plain.weight_hh_l0"}
    small = torch_sluice.compress(model, x, [(x, None)] * 2, keep=0.9, prune=False, progress=False)
    quantised = {name for name, weight in small.named_parameters() if isinstance(weight, QuantizedWeight)}
    assert quantised == {name for name, weight in model.named_parameters() if weight.dim() == 2 and "plain" not in name}
    with torch.no_grad():
        assert relative_error(small(x), model.eval()(x)) < 0.05
    torch_sluice.compress.save(small, tmp_path / "x")
    assert torch.equal(torch_sluice.compress.load(tmp_path / "x", model)(x), small(x))


def test_a_recurrent_layer_stays_whole():
    model, x = nn.Sequential(nn.LSTM(12, 16)), torch.randn(6, 4, 12)
    nn.init.constant_(model[0].weight_hh_l0, torch.nan)
    kinds, reasons = find(model, x)
    assert kinds == {}
    assert reasons["0.weight_ih_l0"] == "another weight of its layer stays"
    assert reasons["0.weight_hh_l0"] == "its weight has NaN or infinity"


def test_layers_without_an_integer_kernel_say_so():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.pair, self.conv = nn.EmbeddingBag(50, 8), nn.Bilinear(8, 8, 8), nn.Conv1d(8, 8, 3)
            self.idle = nn.ModuleList([nn.EmbeddingBag(50, 8), nn.Bilinear(8, 8, 8), nn.Conv1d(8, 8, 3)])

        def forward(self, ids):
            x = self.bag(ids)
            return self.conv(self.pair(x, x)[:, :, None].expand(-1, -1, 5))

    kinds, reasons = find(Mixed(), torch.randint(50, (4, 6)))
    assert kinds == {}
    for name, function in (("bag", "embedding_bag"), ("pair", "bilinear"), ("conv", "conv1d")):
        assert reasons[name] == f"its weight is used by {function}, which no integer kernel serves"
    assert all(reasons[f"idle.{n}"] == "it is not called for example_inputs by itself" for n in range(3))


def test_depthwise_and_complex_and_recurrent_weights_stay():
    depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    kinds, reasons = find(depthwise, torch.randn(1, 8, 5, 5))
    assert kinds == {"1": "conv2d"}
    assert reasons["0"].startswith("it is depth-wise")
    kinds, reasons = find(nn.RNN(6, 5), torch.randn(3, 6))
    assert kinds == {}
    assert set(reasons) == {"weight_ih_l0", "weight_hh_l0"}
    assert all("rnn_tanh" in reason for reason in reasons.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_of_half_precision_are_quantised(dtype):
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).to(dtype), torch.randn(8, 64).to(dtype)
    small = torch_sluice.compress(model, x, [(x, None)] * 2, keep=0.9, prune=False, progress=False)
    assert small[0].weight.dtype == dtype
    assert small(x).dtype == dtype


class Picky(nn.Module):
    """Raises where one of its weights is not an ordinary tensor: once with an error that no library would expect."""

    def __init__(self, error):
        super().__init__()
        self.good, self.bad, self.error = nn.Linear(8, 8), nn.Linear(8, 8), error

    def forward(self, x):
        if type(self.bad.weight) is not nn.Parameter:
            raise self.error
        return self.bad(self.good(x))


@pytest.mark.parametrize("error", [AttributeError("no"), StopIteration(), AssertionError(), KeyError("x"), OSError(5)])
def test_no_failure_of_a_candidate_leaves(error):
    model, x = Picky(error), torch.randn(4, 8)
    kinds, reasons = find(model, x)
    assert kinds == {"good": "linear"}
    assert reasons["bad"].startswith("quantised it fails: ")
    small = torch_sluice.compress(model, x, [(x, None)] * 2, keep=0.9, prune=False, progress=False)
    assert type(small.good.weight) is QuantizedWeight
    assert type(small.bad.weight) is nn.Parameter


class Choosy(nn.Module):
    """Fails with one quantised weight on batches that the example does not show."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        assert len(x) == 1 or type(self.second.weight) is nn.Parameter
        return self.second(self.first(x))


def test_a_failure_on_other_batches_stays_out_too():
    model, x = Choosy(), torch.randn(6, 8)
    small = torch_sluice.compress(model, x[:1], [(x, None)] * 2, keep=0.9, prune=False, progress=False)
    assert type(small.first.weight) is QuantizedWeight
    assert type(small.second.weight) is nn.Parameter
    (decision,) = [layer for layer in small.compression_report.layers if layer.name == "second"]
    assert decision.action == "float"
    assert "AssertionError" in decision.reason


def test_the_model_is_as_it_was_after_candidates_were_tried(monkeypatch):
    monkeypatch.undo()
    encoder = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(encoder, 2).eval()
    x, before = torch.randn(2, 5, 32), {name: id(parameter) for name, parameter in model.named_parameters()}
    values = copy.deepcopy(model.state_dict())
    expected = model(x)
    find(model, x)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert model.use_nested_tensor is True
    assert model.layers[0].activation_relu_or_gelu == 1
    assert torch.equal(model(x), expected)


def test_quantised_copies_do_not_copy_what_they_replace(monkeypatch):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    chosen, _ = quantization.find_candidates(model, torch.randn(2, 64), OPTIONS, Progress(False))
    copied = []
    former = nn.Parameter.__deepcopy__
    monkeypatch.setattr(
        nn.Parameter, "__deepcopy__", lambda self, memo: copied.append(self.numel()) or former(self, memo)
    )
    small = quantization.apply(model, chosen)
    assert max(copied) == 64  # biases
    assert small[0].weight is not chosen[0].weight
    assert all(type(layer.weight) is nn.Parameter for layer in model)


def test_a_compressed_model_can_be_compressed_again(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), torch.randn(16, 32)
    small = torch_sluice.compress(model, x, [(x, None)] * 2, keep=0.9, prune=False, progress=False)
    smaller = torch_sluice.compress(small, x, [(x, None)] * 2, keep=0.9, prune=False, progress=False)
    reasons = {layer.name: layer.reason for layer in smaller.compression_report.layers}
    assert reasons == {"0": "its weight is quantised already", "2": "its weight is quantised already"}
    with torch.no_grad():
        assert torch.equal(smaller(x), small(x))
    torch_sluice.compress.save(smaller, tmp_path / "x")
    assert torch.equal(torch_sluice.compress.load(tmp_path / "x", model)(x), smaller(x))


def test_uses_are_seen_through_transposes_and_conversions():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Parameter(torch.randn(6, 6)) for _ in range(4))

        def forward(self, x):
            x = x @ self.a.t() + torch.matmul(x, self.b.to(x.dtype))
            return F.linear(x, self.c.T) + F.linear(x, self.d[:6])

    model = Model()
    uses = watch_uses(model, lambda: model(torch.randn(2, 6)), ["a", "b", "c", "d"])
    assert {name: use.kinds for name, use in uses.items()} == {
        "a": {"linear"}, "b": {"transposed"}, "c": {"transposed"}, "d": set()
    }  # fmt: skip
    assert uses["d"].others == {"__getitem__"}
    assert all(use.seconds > 0 for name, use in uses.items() if name != "d")


class Shared(nn.Module):
    """A norm behind a layer whose output something else reads, too: folding must leave it."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.linear, self.norm1 = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        y = self.conv(x)
        return self.norm1(self.linear((self.norm(y) + y).mean((2, 3))))


def test_batch_norms_are_folded_where_that_changes_nothing():
    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(4, 3, 8, 8)
    for norm in (model.norm, model.norm1):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        expected = model(x)
        assert fold_batch_norms(model, x) == ["norm1"]
        assert isinstance(model.norm, nn.BatchNorm2d)
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
