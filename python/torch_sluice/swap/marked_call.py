"""One call of a marked attention function in a swapped layer: by the operator, else by the function itself."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.swap.call import attend_gated, attend_open
from torch_sluice.swap.marked import Call, Marked, to_layout
from torch_sluice.swap.marked_proof import Proof
from torch_sluice.swap.masks import as_bool_mask, remember
from torch_sluice.swap.weights import LazyWeights


def attend_marked(
    module: nn.Module,
    logits: Callable[[], tuple[Tensor, Tensor, Any]],
    marked: Marked,
    proof: Proof,
    call: Call,
    args: tuple,
    kwargs: dict[str, Any],
) -> Any:
    """What the function would return. ``logits()`` are those of the layer's gate, and its cache.

    Raises:
        ValueError: the layer has a gate, and the call is one that the function wasn't tried with.
    """
    gate = module.sluice_gate
    reason = _why_not(marked, proof, call)
    if reason is not None and gate is not None:
        raise ValueError(f"{type(module).__name__} calls {marked.title} with {reason}: its gate does not work there")

    def compute_the_old_way():
        return marked.function(*args, **kwargs)

    if reason is not None:
        return compute_the_old_way()
    q, k, v, n_k = call.q, call.k, call.v, call.k.shape[2]
    mask, bias = call.mask, call.bias
    if call.causal and _side(proof, q) == "begin":
        n_k = min(q.shape[2], n_k)
        k, v = k[:, :, :n_k], v[:, :, :n_k]
        mask, bias = (x if x is None or x.shape[-1] == 1 else x[..., :n_k] for x in (mask, bias))
    causal = call.causal or (marked.mask_is_causal and mask is not None)
    if gate is None:
        if call.dropout or not _adds_nothing(bias):
            return compute_the_old_way()
        if (
            mask is not None
            and call.causal
            and (torch.compiler.is_compiling() or not _all_see_a_key(mask, marked, q, n_k))
        ):
            return compute_the_old_way()  # what such rows become is the function's own
        mask = _whole_mask(mask, None, call.causal, marked, proof, q.shape[2], n_k)
        out = attend_open(q, k, v, mask=mask, causal=causal, scale=call.scale, softcap=call.softcap)
        if out is None:
            return compute_the_old_way()

        def weights():
            return compute_the_old_way()[1]
    else:
        a, b, cache = logits()
        causal = causal or (cache is not None and q.shape[2] == 1)  # decoders leave it out for one token
        mask = _whole_mask(mask, bias, call.causal, marked, proof, q.shape[2], n_k)
        out, weights = attend_gated(
            gate, (a, b[:, :, :n_k]), module.sluice_options, q, k, v, mask=mask, causal=causal, scale=call.scale,
            dropout=call.dropout, cache=cache, softcap=call.softcap,
        )  # fmt: skip
    out = to_layout(out, marked.output)
    if proof.container is None:
        return out
    items = [out]
    if proof.items == 2:
        items.append(_weights(weights, call) if proof.weights else None)
    return proof.container(items)


def _weights(compute: Callable[[], Tensor], call: Call) -> Tensor:
    """Most layers give them and most models drop them."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return compute()
    sources = [x for x in (call.q, call.k, call.mask, call.bias) if x is not None]
    return LazyWeights((*call.q.shape[:3], call.k.shape[2]), compute, sources)


def _side(proof: Proof, q: Tensor) -> str | None:
    return proof.single if q.shape[2] == 1 else proof.oblong


def _why_not(marked: Marked, proof: Proof, call: Call) -> str | None:
    """What in a call the function wasn't tried with, if anything."""
    if call.unknown is not None:
        return f"{call.unknown}, of which its mark says nothing"
    q, k, v = call.q, call.k, call.v
    if not q.dim() == k.dim() == v.dim() == 4:
        return f"q {list(q.shape)}, k {list(k.shape)} and v {list(v.shape)}, expected the layout that was said"
    if not k.shape[1] or q.shape[1] % k.shape[1] or q.shape[1] // k.shape[1] not in proof.groups:
        return (
            f"{q.shape[1]} query and {k.shape[1]} key heads, expected groups of {' or '.join(map(str, proof.groups))}"
        )
    if q.shape[2] != k.shape[2]:
        side = _side(proof, q)
        if side is None or (side == "begin" and call.causal and q.shape[2] > k.shape[2]):
            return f"{q.shape[2]} queries and {k.shape[2]} keys, which it was not seen to take"
        if call.causal and q.shape[2] > k.shape[2]:
            return f"{q.shape[2]} queries and {k.shape[2]} keys, expected no more queries than keys"
    mask = call.mask
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() > 4:
        return (
            f"a mask {list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__}, expected four dimensions"
        )
    is_bool = mask.dtype == torch.bool
    if is_bool != (marked.mask_means != "added") and marked.mask_means != "sdpa":
        return f"a mask of {mask.dtype}, expected {'numbers' if marked.mask_means == 'added' else 'booleans'}"
    return None


def _adds_nothing(bias: Tensor | None) -> bool:
    if bias is None:
        return True
    return not bias.requires_grad and not torch.compiler.is_compiling() and not bool(bias.any())


def _four(x: Tensor) -> Tensor:
    return x[(None,) * (4 - x.dim())]


def _later(n_q: int, n_k: int, device: torch.device) -> Tensor:
    return torch.ones(n_q, n_k, dtype=torch.bool, device=device).triu(n_k - n_q + 1)


def _all_see_a_key(mask: Tensor, marked: Marked, q: Tensor, n_k: int) -> bool:
    """Whether every query sees a key by a mask and the causal triangle."""

    def look():
        seen = as_bool_mask(mask)
        if seen is None:
            seen = mask > torch.finfo(mask.dtype).min
        seen = _four(~seen if marked.mask_means == "hidden" else seen)
        return bool((seen & ~_later(q.shape[2], n_k, mask.device)).any(-1).all())

    return look() if mask.requires_grad else remember(mask, ("sees", marked.mask_means, q.shape[2], n_k), look)


def _whole_mask(
    mask: Tensor | None, bias: Tensor | None, causal: bool, marked: Marked, proof: Proof, n_q: int, n_k: int
) -> Tensor | None:
    """Mask, bias and, where there is one of them, the causal triangle in one, as the operator's masks mean it."""
    if mask is None and bias is None:
        return None

    def join():
        whole = None if mask is None else _four(mask)
        if whole is not None and whole.dtype == torch.bool:
            whole = ~whole if marked.mask_means == "hidden" else whole
        if bias is not None:
            numbers = _four(bias).float()
            if whole is not None and whole.dtype == torch.bool:
                whole = numbers.masked_fill(~whole, _least(proof))
            else:
                whole = numbers if whole is None else numbers + whole.float()
        elif proof.mean and whole.dtype == torch.bool:
            whole = torch.zeros(whole.shape, device=whole.device).masked_fill(~whole, _least(proof))
        if causal:
            later = _later(n_q, n_k, whole.device)
            whole = whole & ~later if whole.dtype == torch.bool else whole.masked_fill(later, -torch.inf)
        return whole

    if mask is None or bias is not None or mask.requires_grad or torch.compiler.is_compiling():
        return join()
    return remember(mask, ("whole", marked.mask_means, proof.mean, causal, n_q, n_k), join)


def _least(proof: Proof) -> float:
    """What a hidden pair adds to its score: a number that swallows the score, or, as most functions have it, -inf."""
    return torch.finfo(torch.float32).min if proof.mean else -torch.inf
