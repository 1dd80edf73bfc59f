"""What the sluice:: attention operators need beside their kernels: shapes for tracing, gradients, autocast.

All of it is registered from Python, because LibTorch's stable ABI has no C++ way to do it that holds across versions.
"""

import functools

import torch

from torch_sluice import _functorch
from torch_sluice._errors import check_tensors
from torch_sluice._fakes import register_fake

_FORWARD = torch.ops.sluice.gated_attention.default
_BACKWARD = torch.ops.sluice.gated_attention_backward.default
_library = torch.library.Library("sluice", "FRAGMENT")  # keeps the autocast registrations alive


def _gate_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_shape(name, tensor, expected, meaning):
    if tensor.dim() != len(expected):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {meaning}")
    for size, wanted in zip(tensor.shape, expected, strict=True):
        torch._check_value(
            size == wanted, lambda: f"{name} has shape {list(tensor.shape)}, expected {meaning} = {list(expected)}"
        )


def _check_mask(mask, full, meaning):
    if mask.dim() != 4 or any(x != 1 and x != y for x, y in zip(mask.shape, full, strict=True)):
        raise ValueError(
            f"attn_mask has shape {list(mask.shape)}, expected {meaning} = {list(full)}, or 1 instead of any of them"
        )


def _check_inputs(
    q, k, v, a, b, logit_tau, key_range, q_offset, text_begin, attn_mask, alibi_slopes, output_gate, dropout_seed
):
    """The shape checks of the native operator, for tracing with fake tensors."""
    for name, tensor, meaning in (
        ("q", q, "[batch, heads_q, n_q, head_dim]"),
        ("k", k, "[batch, heads_kv, n_k, head_dim]"),
        ("v", v, "[batch, heads_kv, n_k, head_dim_v]"),
    ):
        if tensor.dim() != 4:
            raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {meaning}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, expected the dtype of q, which is {q.dtype}")
    batch, heads_q, n_q, head_dim = q.shape
    heads_kv, n_k = k.shape[1:3]
    _check_shape("k", k, (batch, heads_kv, n_k, head_dim), "[batch, heads_kv, n_k, head_dim]")
    _check_shape("v", v, (batch, heads_kv, n_k, v.shape[3]), "[batch, heads_kv, n_k, head_dim_v]")
    _check_shape("a", a, (batch, heads_q, n_q), "[batch, heads_q, n_q]")
    _check_shape("b", b, (batch, heads_kv, n_k), "[batch, heads_kv, n_k]")
    torch._check_value(
        heads_q % heads_kv == 0, lambda: f"heads_q is {heads_q}, expected a multiple of heads_kv, which is {heads_kv}"
    )
    if logit_tau is not None:
        _check_shape("logit_tau", logit_tau, (batch, heads_q), "[batch, heads_q]")
    if key_range is not None:
        _check_shape("key_range", key_range, (batch, 2), "[batch, 2]")
    for name, places in (("q_offset", q_offset), ("text_begin", text_begin)):
        if places is not None:
            _check_shape(name, places, (batch,), "[batch]")
    if attn_mask is not None:
        _check_mask(attn_mask, (batch, heads_q, n_q, n_k), "[batch, heads_q, n_q, n_k]")
    if alibi_slopes is not None:
        _check_shape("alibi_slopes", alibi_slopes, (batch, heads_q), "[batch, heads_q]")
    if output_gate is not None:
        channels = 1 if output_gate.dim() == 4 and output_gate.shape[3] == 1 else v.shape[3]
        _check_shape(
            "output_gate", output_gate, (batch, heads_q, n_q, channels), "[batch, heads_q, n_q, 1 or head_dim_v]"
        )
    if dropout_seed is not None:
        _check_shape("dropout_seed", dropout_seed, (1,), "[1]")


@register_fake("gated_attention")
def _fake_forward(
    q, k, v, a, b, logit_tau, key_range, q_offset, text_begin, attn_mask, alibi_slopes, output_gate, dropout_seed,
    causal, window, sinks, sliding_window, softcap, dropout_p, scale,
):  # fmt: skip
    places = (key_range, q_offset, text_begin)
    _check_inputs(q, k, v, a, b, logit_tau, *places, attn_mask, alibi_slopes, output_gate, dropout_seed)
    batch, heads_q, n_q, _ = q.shape
    out = q.new_empty((batch, heads_q, n_q, v.shape[3]))
    lse = q.new_empty((batch, heads_q, n_q), dtype=_gate_dtype(q.dtype))
    return out, lse, q.new_empty((batch, heads_q, n_q), dtype=torch.int32)


@register_fake("gated_attention_backward")
def _fake_backward(
    dout, dlse, q, k, v, a, b, logit_tau, key_range, q_offset, text_begin, attn_mask, alibi_slopes, output_gate,
    dropout_seed, out, lse, causal, window, sinks, sliding_window, softcap, dropout_p, scale, mask_gradient,
):  # fmt: skip
    places = (key_range, q_offset, text_begin)
    _check_inputs(q, k, v, a, b, logit_tau, *places, attn_mask, alibi_slopes, output_gate, dropout_seed)
    dattn_mask = q.new_empty(attn_mask.shape if mask_gradient else (0,), dtype=_gate_dtype(q.dtype))
    doutput_gate = q.new_empty((0,) if output_gate is None else output_gate.shape)
    return *(tensor.new_empty(tensor.shape) for tensor in (q, k, v, a, b)), dattn_mask, doutput_gate


for _operator, _kernel in ((_FORWARD, _functorch.forward), (_BACKWARD, _functorch.backward)):
    _name = _operator.name().partition(".")[0]
    _library.impl(_name.partition("::")[2], _kernel, "Autograd")
    torch.library.register_vmap(_name, functools.partial(_functorch.map_operator, _operator))


def _register_autocast(device_type: str, key_name: str) -> None:
    """Under autocast q, k, v take the autocast dtype and the gate logits float32: rounding a gate to 8 bits of
    mantissa would move pairs across the threshold."""
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key_name))

    def forward(q, k, v, a, b, *rest):
        *tensors, gate, seed = rest[: _functorch.TENSORS - 5]
        check_tensors(q=q, k=k, v=v, a=a, b=b)
        dtype = torch.get_autocast_dtype(device_type)
        q, k, v = (x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (q, k, v))
        if q.dtype != torch.float64:
            a, b = (x.float() if x.is_floating_point() else x for x in (a, b))
        with torch._C._ExcludeDispatchKeyGuard(key):
            gate = gate if gate is None else gate.to(q.dtype)
            return _FORWARD(q, k, v, a, b, *tensors, gate, seed, *rest[_functorch.TENSORS - 5 :])

    _library.impl("gated_attention", forward, key_name)


_register_autocast("cpu", "AutocastCPU")
_register_autocast("cuda", "AutocastCUDA")
