"""What sluice::gated_attention_paged needs beside its kernel: shapes for tracing, autocast, gradients refused."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_sluice import _functorch
from torch_sluice._errors import check_tensors
from torch_sluice._fakes import register_fake
from torch_sluice._operators import _check_mask, _check_shape, _gate_dtype

OPERATOR = torch.ops.sluice.gated_attention_paged.default
FORWARD_MODE = "sluice::gated_attention_paged has no derivatives, and none in forward mode (jvp, jacfwd, forward_ad)"
_NAMES = ("q", "k_cache", "v_cache", "a", "b_cache", "block_table", "seqlens_k")
_library = torch.library.Library("sluice", "FRAGMENT")  # keeps the registrations alive


@register_fake("gated_attention_paged")
def _fake(
    q, k_cache, v_cache, a, b_cache, block_table, seqlens_k, logit_tau, q_offset, attn_mask, alibi_slopes, causal,
    window, sinks, sliding_window, softcap, scale,
):  # fmt: skip
    for name, tensor, meaning in (
        ("q", q, "[batch, heads_q, n_q, head_dim]"),
        ("k_cache", k_cache, "[num_blocks, block_size, heads_kv, head_dim]"),
        ("v_cache", v_cache, "[num_blocks, block_size, heads_kv, head_dim_v]"),
        ("block_table", block_table, "[batch, max_blocks]"),
    ):
        if tensor.dim() != len(meaning.split(",")):
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {meaning}")
    batch, heads_q, n_q, head_dim = q.shape
    blocks, block_size, heads_kv, _ = k_cache.shape
    head_dim_v, max_blocks = v_cache.shape[3], block_table.shape[1]
    for name, tensor, shape, meaning in (
        ("k_cache", k_cache, (blocks, block_size, heads_kv, head_dim), "[num_blocks, block_size, heads_kv, head_dim]"),
        ("v_cache", v_cache, (blocks, block_size, heads_kv, head_dim_v), "[num_blocks, block_size, heads_kv, .]"),
        ("a", a, (batch, heads_q, n_q), "[batch, heads_q, n_q]"),
        ("b_cache", b_cache, (blocks, block_size, heads_kv), "[num_blocks, block_size, heads_kv]"),
        ("block_table", block_table, (batch, max_blocks), "[batch, max_blocks]"),
        ("seqlens_k", seqlens_k, (batch,), "[batch]"),
        ("logit_tau", logit_tau, (batch, heads_q), "[batch, heads_q]"),
        ("q_offset", q_offset, (batch,), "[batch]"),
        ("alibi_slopes", alibi_slopes, (batch, heads_q), "[batch, heads_q]"),
    ):
        if tensor is not None:
            _check_shape(name, tensor, shape, meaning)
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected the dtype of q, which is {q.dtype}")
    torch._check_value(
        heads_q % heads_kv == 0, lambda: f"heads_q is {heads_q}, expected a multiple of heads_kv, which is {heads_kv}"
    )
    if attn_mask is not None:
        full = (batch, heads_q, n_q, max_blocks * block_size)
        _check_mask(attn_mask, full, "[batch, heads_q, n_q, max_blocks * block_size]")
    rows = batch, heads_q, n_q
    lse, kept = q.new_empty(rows, dtype=_gate_dtype(q.dtype)), q.new_empty(rows, dtype=torch.int32)
    return q.new_empty((*rows, head_dim_v)), lse, kept


def _refuse_gradients(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The operator's kernel for autograd."""
    check_tensors(**dict(zip(_NAMES, arguments, strict=False)))
    tensors = [value for value in arguments if isinstance(value, Tensor)]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise NotImplementedError(FORWARD_MODE)  # the tangent would be lost without a word
    if torch.is_grad_enabled():
        for argument, value in zip(OPERATOR._schema.arguments, arguments, strict=True):
            if isinstance(value, Tensor) and value.requires_grad:
                raise ValueError(
                    f"{argument.name} requires a gradient, expected none under grad mode: gated_attention_paged has no "
                    "backward; call it under torch.no_grad(), or train with torch_sluice.gated_attention"
                )
    with torch._C._AutoDispatchBelowAutograd():
        return OPERATOR(*arguments)


def run(arguments: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """The operator; where nothing is differentiated past the kernel above, which is Python and costs microseconds."""
    if torch.compiler.is_compiling() or _functorch.is_transformed() or forward_ad._current_level >= 0:
        return OPERATOR(*arguments)
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
        return OPERATOR(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return OPERATOR(*arguments)


def _register_autocast(key_name: str) -> None:
    """Under autocast q takes the dtype of the cache, which stays, and the gates float32."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key_name))

    def cast(q, k_cache, v_cache, a, b_cache, *rest):
        check_tensors(**dict(zip(_NAMES, (q, k_cache, v_cache, a, b_cache, *rest), strict=False)))
        if q.is_floating_point() and k_cache.is_floating_point():
            q = q.to(k_cache.dtype)
        if a.is_floating_point():
            a = a.to(_gate_dtype(q.dtype))
        with torch._C._ExcludeDispatchKeyGuard(key):
            return OPERATOR(q, k_cache, v_cache, a, b_cache, *rest)

    _library.impl("gated_attention_paged", cast, key_name)


_library.impl("gated_attention_paged", _refuse_gradients, "Autograd")
_register_autocast("AutocastCPU")
_register_autocast("AutocastCUDA")
