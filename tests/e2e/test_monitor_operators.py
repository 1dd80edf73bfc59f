"""Operators without a formula in torch's own counter: counted where the formula is standard, else named, never 0."""

import html
import json
import warnings

import pytest
import torch
import torch.utils.mkldnn
from torch import nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import flop_registry, register_flop_formula

from torch_sluice.monitor import Monitor, MonitorWarning, count_flops, measure_flops
from torch_sluice.monitor.operators import computes

F = nn.functional
LIMITS = dict(peak_flops=1e9, memory_ratio_limit=None)


def numbers(*shape, **options):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(**options)


def executed(call) -> int:
    """The operations of the call, in which everything is known."""
    count = measure_flops(call)
    assert count.unknown == {}
    assert sum(count.by_dtype.values()) == count.executed
    return count.executed


B, N, D, H = 3, 5, 16, 32  # sequences, their length, width, hidden width
X = numbers(B, N, D)
ATTENTION = 2 * B * N * 4 * D * D + 4 * B * N * N * D  # projections of q, k, v and the output; QK^T and PV


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("training", [False, True])
def test_attention_and_encoder_layers_have_the_same_operations_on_the_fused_path(context, training):
    attention = nn.MultiheadAttention(D, 4, batch_first=True).train(training)
    layer = nn.TransformerEncoderLayer(D, 4, H, batch_first=True).train(training)
    with context():
        assert executed(lambda: attention(X, X, X)) == ATTENTION
        assert executed(lambda: attention(X, X, X, need_weights=False)) == ATTENTION
        assert executed(lambda: layer(X)) == ATTENTION + 2 * B * N * 2 * D * H


def test_the_fused_path_leaves_padding_out():
    layer = nn.TransformerEncoderLayer(D, 4, H, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    lengths = [5, 3, 2]
    padding = torch.arange(N) >= torch.tensor(lengths).unsqueeze(1)
    tokens, pairs = sum(lengths), sum(n * n for n in lengths)
    with torch.no_grad():
        counted = executed(lambda: encoder(X, src_key_padding_mask=padding))
    assert counted == 2 * (2 * tokens * (4 * D * D + 2 * D * H) + 4 * pairs * D)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize(
    "options", [{}, dict(num_layers=2, bidirectional=True, batch_first=True), dict(bias=False), dict(dropout=0.0)]
)
def test_recurrent_layers_meet_every_weight_at_every_step(kind, options):
    layer = kind(D, 8, **options)
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
    x = X.clone().requires_grad_()
    assert executed(lambda: layer(x)) == 2 * B * N * weights
    with torch.no_grad():
        assert executed(lambda: layer(X)) == 2 * B * N * weights
    loss = layer(x)[0].sum()
    backward = executed(loss.backward)
    # Both gradients; a layer that torch puts together of products leaves out that of the first state.
    assert 2 * B * N * weights < backward <= 4 * B * N * weights
    assert kind is not nn.LSTM or backward == 4 * B * N * weights


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_leave_padding_out(kind):
    layer = kind(D, 8, batch_first=True)
    packed = nn.utils.rnn.pack_padded_sequence(X, torch.tensor([5, 3, 2]), batch_first=True)
    weights = sum(parameter.numel() for parameter in layer.parameters() if parameter.dim() == 2)
    assert executed(lambda: layer(packed)) == 2 * (5 + 3 + 2) * weights


def test_an_lstm_on_another_device_has_the_same_formula():
    """As ``_cudnn_rnn``, which no CPU runs: the shapes are all that is asked."""
    layer = nn.LSTM(D, 8, num_layers=2, proj_size=4)
    weights = list(layer.parameters())
    from torch_sluice.monitor.torch_formulas import FORMULAS, Call

    x = X.transpose(0, 1)
    arguments = (x, weights, 4, None, x, x, 2, 8, 4, 2, False, 0.0, True, False, [], None)
    forward = FORMULAS["aten::_cudnn_rnn"](Call(torch.ops.aten._cudnn_rnn.default, arguments, {}, None))
    assert forward == executed(lambda: layer(x))
    operator = torch.ops.aten._cudnn_rnn_backward.default
    for mask, passes in (((True, True, True, True), 2), ((True, False, False, False), 1)):
        arguments = (x, weights, 4, x, x, x, x, x, x, x, 2, 8, 4, 2, False, 0.0, True, False, [], None, x, mask)
        assert FORMULAS["aten::_cudnn_rnn_backward"](Call(operator, arguments, {}, None)) == passes * forward


PRODUCTS = {
    "matrix times vector": (lambda: X[0] @ X[0, 0], 2 * N * D),
    "addmv": (lambda: torch.addmv(torch.zeros(N), X[0], X[0, 0]), 2 * N * D),
    "addmv in place": (lambda: torch.zeros(N).addmv_(X[0], X[0, 0]), 2 * N * D),
    "dot": (lambda: X[0, 0] @ X[0, 0], 2 * D),
    "vdot": (lambda: torch.vdot(X[0, 0], X[0, 0]), 2 * D),
    "addr": (lambda: torch.addr(torch.zeros(D, D), X[0, 0], X[0, 0]), 2 * D * D),
    "addmm in place": (lambda: torch.zeros(N, N).addmm_(X[0], X[0].T), 2 * N * N * D),
    "addmm into out": (lambda: torch.addmm(X[0, :, :1], X[0], X[0].T, out=torch.empty(N, N)), 2 * N * N * D),
    "baddbmm": (lambda: torch.baddbmm(torch.zeros(B, N, N), X, X.mT), 2 * B * N * N * D),
    "baddbmm in place": (lambda: torch.zeros(B, N, N).baddbmm_(X, X.mT), 2 * B * N * N * D),
    "addbmm": (lambda: torch.addbmm(torch.zeros(N, N), X, X.mT), 2 * B * N * N * D),
    "einsum": (lambda: torch.einsum("bnd,bmd->bnm", X, X), 2 * B * N * N * D),
    "vmap": (lambda: torch.vmap(lambda x: x @ x.mT)(X), 2 * B * N * N * D),
    "scripted": (lambda: torch.jit.script(nn.Linear(D, H))(X), 2 * B * N * D * H),
    "int8": (lambda: torch._int_mm(*[torch.ones(32, 32, dtype=torch.int8)] * 2), 2 * 32**3),
    "oneDNN's layout": (lambda: F.linear(X.to_mkldnn(), torch.ones(H, D).to_mkldnn()), 2 * B * N * D * H),
    "conv_tbc": (lambda: torch.conv_tbc(numbers(7, 2, 8), numbers(3, 8, 4), torch.zeros(4)), 2 * 5 * 2 * 3 * 8 * 4),
    "affine grid": (lambda: F.affine_grid(numbers(2, 2, 3), [2, 8, 10, 10]), 2 * 2 * 100 * 2 * 3),
    "a branch": (lambda: torch.cond(torch.tensor(False), torch.linalg.inv, lambda x: x @ x.T, (X[0],)), 2 * N * N * D),
    "nested": (lambda: nn.Linear(D, H)(torch.nested.nested_tensor([X[0], X[1, :2]])), 2 * (N + 2) * D * H),
    "jagged": (
        lambda: nn.Linear(D, H)(torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged)),
        2 * (N + 2) * D * H,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_products_of_every_kind_are_counted(name):
    call, operations = PRODUCTS[name]
    with torch.no_grad():
        assert executed(call) == operations


def test_grouped_and_transposed_convolutions_forward_and_backward():
    image = numbers(2, 8, 10, 10).requires_grad_()
    for layer, products in (
        (nn.Conv2d(8, 16, 3, groups=4), 2 * 16 * 8 * 8 * (8 // 4) * 9),
        (nn.Conv2d(8, 8, 3, groups=8, padding=1), 2 * 8 * 10 * 10 * 9),
        (nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2), 2 * 8 * 10 * 10 * (4 // 2) * 9),
    ):
        assert executed(lambda layer=layer: layer(image)) == 2 * products
        assert executed(layer(image).sum().backward) == 2 * 2 * products


def test_grouped_products_of_experts():
    left, right = numbers(16, 32, dtype=torch.bfloat16), numbers(2, 32, 16, dtype=torch.bfloat16)
    ends = torch.tensor([8, 16], dtype=torch.int32)
    assert executed(lambda: torch._grouped_mm(left, right, offs=ends)) == 2 * 16 * 32 * 16


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_torchs_quantised_linear_layer_runs_in_int8():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(D, H)), {nn.Linear}, torch.qint8)
    assert dict(measure_flops(lambda: model(X)).by_dtype) == {"int8": 2 * B * N * D * H}


UNKNOWN = {
    "aten::_cdist_forward": lambda: torch.cdist(X, X),
    "aten::_euclidean_dist": lambda: torch.cdist(numbers(1, 50, 8), numbers(1, 50, 8)),
    "aten::_pdist_forward": lambda: F.pdist(X[0]),
    "aten::_fft_r2c": lambda: torch.stft(numbers(400), 64, window=torch.ones(64), return_complex=True),
    "aten::_fft_c2c": lambda: torch.fft.fft2(X.to(torch.complex64)),
    "aten::_trilinear": lambda: nn.Bilinear(D, D, 4)(X, X),
    "aten::_linalg_svd": lambda: torch.linalg.svd(X),
    "aten::linalg_inv_ex": lambda: torch.linalg.inv(torch.eye(4)),
    "aten::_linalg_solve_ex": lambda: torch.linalg.solve(torch.eye(4), torch.ones(4)),
    "aten::linalg_cholesky_ex": lambda: torch.linalg.cholesky(torch.eye(4)),
    "aten::_sparse_addmm": lambda: torch.sparse.mm(torch.eye(N).to_sparse(), X[0]),
    "aten::mm": lambda: torch.eye(N).to_sparse_csr() @ X[0],  # its formula is that of a dense product
}


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
def test_what_computes_without_a_formula_is_named(name):
    with pytest.warns(MonitorWarning, match=f"FLOPs and MFU are not known.*: {name}"):
        assert count_flops(UNKNOWN[name]) is None
    assert list(measure_flops(UNKNOWN[name]).unknown) == [name]


@torch.library.custom_op("sluice_test::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x @ x.mT


@torch.library.custom_op("sluice_test::double", mutates_args=(), tags=(torch.Tag.pointwise,))
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_an_operator_of_another_library_is_unknown_until_it_has_a_formula():
    assert list(measure_flops(lambda: square(X)).unknown) == ["sluice_test::square"]
    assert executed(lambda: double(X)) == 0
    operator = torch.ops.sluice_test.square
    register_flop_formula(operator)(lambda shape, out_shape=None: 2 * shape[0] * shape[1] ** 2 * shape[2])
    try:
        assert executed(lambda: square(X)) == 2 * B * N * N * D
    finally:
        del flop_registry[operator]


def test_what_is_cheap_leaves_the_count_known():
    image = numbers(2, 4, 8, 8).requires_grad_()

    def step():
        x = nn.BatchNorm2d(4)(F.gelu(image)) + F.interpolate(F.avg_pool2d(image, 2), scale_factor=2, mode="bilinear")
        x = F.grid_sample(F.max_pool2d(x, 2), numbers(2, 3, 3, 2), align_corners=False)
        x = nn.LayerNorm(9)(x.flatten(2)).softmax(-1).cumsum(-1)[..., torch.randperm(9)]
        x = torch.cat([x, torch.roll(x, 1), F.pad(x, (1, 1))[..., 1:-1]])
        x = x * F.dropout(torch.ones(9)).outer(torch.ones(9))[0]
        values, places = x.sort()
        x = values + torch.zeros_like(x).scatter_add(-1, places, x) + torch.linalg.vector_norm(x) + x.topk(2)[0].sum()
        embedded = nn.Embedding(9, 4)(places).sum() + nn.EmbeddingBag(9, 4)(places.flatten(1)).mean()
        loss = F.cross_entropy(x.flatten(1), torch.zeros(len(x), dtype=torch.long)) + embedded
        (loss + x.var() + x.prod(-1).std()).backward()
        nn.utils.clip_grad_norm_([image], 1.0)
        torch.optim.AdamW([image]).step()

    assert executed(step) == 0


def test_torchs_operators_are_told_apart_by_their_names():
    def verdict(names, library=torch.ops.aten):
        packets = {name: getattr(library, name) for name in names.split() if hasattr(library, name)}
        return {name: computes(getattr(packet, packet.overloads()[0])) for name, packet in packets.items()}

    contracting = verdict(
        "mm bmm addmm_ mv dot vdot linear matmul baddbmm_ _int_mm _scaled_mm _grouped_mm _foreach_mm convolution "
        "convolution_backward conv_tbc slow_conv_transpose2d mkldnn_convolution _scaled_dot_product_flash_attention "
        "_efficient_attention_backward _native_multi_head_attention _transformer_encoder_layer_fwd _cudnn_rnn "
        "_cudnn_rnn_backward mkldnn_rnn_layer quantized_lstm _lstm_mps _fft_c2r _cdist_backward linalg_qr geqrf ormqr "
        "linalg_lu_solve linalg_solve_triangular triangular_solve cholesky_inverse linalg_matrix_exp linalg_eig "
        "_trilinear _sparse_addmm sspaddmm hspmm _weight_int4pack_mm _dyn_quant_matmul_4bit"
    )
    cheap = verdict(
        "add mul relu gelu prelu softmax _log_softmax sum mean var amax norm linalg_vector_norm linalg_cross renorm "
        "native_layer_norm native_batch_norm native_group_norm convolution_mode copy_ clone _to_copy cat stack index "
        "index_put_ gather scatter_add embedding embedding_dense_backward _embedding_bag sort topk cumsum multinomial "
        "upsample_linear1d upsample_bilinear2d upsample_trilinear3d grid_sampler_2d avg_pool2d max_pool2d_with_indices "
        "im2col col2im native_dropout bernoulli_ normal_ randn hamming_window fft_fftfreq triu tril trace diag_embed "
        "_thnn_fused_lstm_cell _thnn_fused_gru_cell _cudnn_rnn_flatten_weight mkldnn_reorder_conv2d_weight "
        "_convert_weight_to_int4pack _transform_bias_rescale_qkv _nested_tensor_from_mask to_padded_tensor lu_unpack "
        "_foreach_add _fused_adamw_ _foreach_norm conj_physical complex polar lgamma digamma slice_inverse"
    )
    assert {name for name, verdict in contracting.items() if not verdict} == set()
    assert {name for name, verdict in cheap.items() if verdict} == set()
    assert len(contracting) > 30
    assert len(cheap) > 60
    assert not any(verdict("all_reduce all_gather_into_tensor wait_tensor", torch.ops._c10d_functional).values())
    assert not any(verdict("linear_prepack conv2d_stride add mul_relu", torch.ops.quantized).values())
    assert all(verdict("linear conv2d matmul quantized_lstm_cell_dynamic", torch.ops.quantized).values())


def test_every_operator_of_sluice_is_known():
    names = {name.split(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("sluice::")}
    packets = {name: getattr(torch.ops.sluice, name.removeprefix("sluice::")) for name in names}
    assert len(packets) >= 10
    for name, packet in packets.items():
        assert (packet in flop_registry) == computes(packet.default), name


class Wrapped(torch.Tensor):
    """A tensor that handles operators itself, by running them on another."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda wrapped: wrapped.inner, (args, kwargs or {}))
        return tree_map_only(torch.Tensor, cls, operator(*args, **kwargs))


def test_what_a_tensor_runs_for_an_operator_is_counted_once():
    left, right = Wrapped(X[0]), Wrapped(X[0].T)
    assert executed(lambda: left @ right) == 2 * N * N * D
    assert list(measure_flops(lambda: torch.cdist(left, left)).unknown) == ["aten::_cdist_forward"]


def test_a_model_that_must_be_compiled_whole_runs_and_is_counted():
    model = torch.compile(nn.Linear(D, H), backend="aot_eager", fullgraph=True)
    for _ in range(2):
        with Monitor(model, mfu_limit=None, **LIMITS) as monitor:
            for _ in range(2):
                with monitor.step():
                    model(X).sum().backward()
        assert monitor.flops_per_step == 2 * 2 * B * N * D * H


@pytest.fixture
def watch(tmp_path):
    """Watches steps; returns the summary, the lines and the page."""

    def run(model, step):
        lines, page = tmp_path / "steps.jsonl", tmp_path / "page.html"
        with Monitor(model, jsonl=lines, report=page, metrics_port=0, mfu_limit=0.7, **LIMITS) as monitor:
            for _ in range(12):  # limits are looked at from the tenth on
                with monitor.step():
                    step()
        return monitor.summary(), [json.loads(line) for line in lines.read_text().splitlines()], page.read_text()

    return run


def test_unknown_operations_are_none_everywhere_and_said_once(watch):
    model = nn.Linear(D, D)
    with pytest.warns(MonitorWarning) as caught:
        summary, lines, page = watch(model, lambda: torch.cdist(model(X), X))
    (warning,) = caught
    assert "aten::_cdist_forward" in str(warning.message)
    names = ("flops_per_step", "flops_per_step_dense_equivalent", "flops_by_dtype", "mfu", "mfu_dense_equivalent")
    assert [summary[name] for name in names] == [None] * 5
    assert summary["uncounted_operators"] == ["aten::_cdist_forward"]
    assert len(lines) == 12
    assert not any({"flops", "mfu"} & line.keys() for line in lines)
    assert "have no formula: aten::_cdist_forward." in html.unescape(page)
    assert "MFU is 0" not in page


def test_the_fused_path_has_an_mfu(watch):
    model = nn.TransformerEncoderLayer(D, 4, H, batch_first=True).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="MFU is")
        summary, lines, _ = watch(model, lambda: model(X))
    assert summary["flops_per_step"] == ATTENTION + 2 * B * N * 2 * D * H
    assert summary["mfu"] > 0
    assert summary["uncounted_operators"] == []
    assert all(line["mfu"] > 0 for line in lines[1:])
