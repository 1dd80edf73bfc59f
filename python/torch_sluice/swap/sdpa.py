"""Modules that call F.scaled_dot_product_attention themselves: their calls are caught while their forward runs."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from torch_sluice.attention import Gate
from torch_sluice.swap.cache import GatedCache, cache_among, with_gates
from torch_sluice.swap.call import attend_gated, attend_open
from torch_sluice.swap.code import codes_of, names_of

_CALLEE = "scaled_dot_product_attention"
_HEADS = ("num_heads", "n_heads", "n_head", "nhead", "num_attention_heads", "heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads")
_WIDTHS = ("embed_dim", "n_embd", "hidden_size", "d_model", "dim")


def calls_sdpa(module: nn.Module) -> bool:
    """Whether a method of module's class (or a base class outside torch) names scaled_dot_product_attention."""
    return any(_CALLEE in names_of(code) for code, _ in codes_of(type(module)))


def first_input(args, kwargs) -> Tensor | None:
    """The layer's input: the first floating-point tensor [B, N, dim] among the arguments of its forward."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
            return value
    return None


class _Interceptor(TorchFunctionMode):
    """Answers scaled_dot_product_attention in place of torch; every other function goes through."""

    def __init__(self, module: nn.Module, x: Tensor | None, sizes: dict | None, logits: tuple | None):
        super().__init__()
        self.module, self.x, self.sizes, self.logits = module, x, sizes, logits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:
            func = torch.unflatten  # the same; the method calls super(), which torch.compile can't trace from here
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        return self._attend(*args, **kwargs)

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if self.sizes is not None and self.x is not None:
            self.sizes[self.module] = (self.x.shape[-1], query.shape[1], key.shape[1])
        gate = self.module.sluice_gate
        q, k, v, causal = query, key, value, is_causal
        regular = q.dim() == k.dim() == v.dim() == 4 and not (is_causal and q.shape[-2] > k.shape[-2])
        if regular and causal:
            # SDPA aligns its causal mask top-left: keys behind the last query are seen by nobody.
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        mask = attn_mask
        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        if gate is None:
            out = None
            if regular and not dropout_p and (attn_mask is None or not is_causal):
                out = attend_open(q, k, v, mask=mask, causal=causal, scale=scale)
            if out is not None:
                return out
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        if not regular:
            raise ValueError(
                f"scaled_dot_product_attention was called with query {list(query.shape)} and key {list(key.shape)}, "
                "expected [batch, heads, tokens, channels], with is_causal no more queries than keys: a gated layer "
                "takes nothing else"
            )
        if self.x is None:
            raise ValueError(
                f"{type(self.module).__name__}.forward got no floating-point tensor [batch, tokens, dim], expected the "
                "layer's input: the gate reads it"
            )
        if mask is not None and is_causal:
            raise ValueError("is_causal is True and attn_mask is given, expected one of them")
        a, b = gate(self.x) if self.logits is None else self.logits
        cache = b if isinstance(b, GatedCache) else None
        b = b if cache is None else cache.b[:, :, : k.shape[2]]
        causal = causal or (cache is not None and q.shape[2] == 1)  # decoders leave it out for one token
        out, _ = attend_gated(
            gate, (a, b), self.module.sluice_options, q, k, v, mask=mask, causal=causal, scale=scale,
            dropout=dropout_p, cache=cache,
        )  # fmt: skip
        return out


class InterceptedForward:
    """The forward of a swapped module: its own, with scaled_dot_product_attention answered by Sluice."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.original = module.__dict__.get("forward")
        self.sizes = None  # a dict while measure() listens

    def __call__(self, *args, **kwargs):
        x, gate, logits = first_input(args, kwargs), self.module.sluice_gate, None
        name = None if gate is None or x is None else cache_among(kwargs)
        if name is not None:
            a, b = gate(x)
            kwargs, cache = with_gates(kwargs, name, b)
            logits = (a, cache)
        with _Interceptor(self.module, x, self.sizes, logits):
            if self.original is not None:
                return self.original(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)


def install(module: nn.Module, options) -> None:
    module.sluice_gate, module.sluice_options = None, options
    module.forward = InterceptedForward(module)


def uninstall(module: nn.Module) -> None:
    original = module.__dict__.pop("forward").original
    if original is not None:
        module.forward = original
    del module.sluice_gate, module.sluice_options


@torch.no_grad()
def measure(model: nn.Module, modules: list[nn.Module], example) -> dict:
    """{module: (width of x, query heads, key heads)} as seen in one forward of model on example."""
    sizes, training = {}, [m for m in model.modules() if m.training]
    for module in modules:
        module.forward.sizes = sizes
    try:
        model.eval()
        model(**example) if isinstance(example, dict) else model(*example)
    finally:
        for module in modules:
            module.forward.sizes = None
        for module in training:
            module.training = True
    return sizes


def guess_sizes(name: str, module: nn.Module) -> tuple[int, int, int]:
    """(width of x, query heads, key heads) from the module's attributes, its config's, or its first linear layer."""
    sources = (module, getattr(module, "config", None))

    def find(names):
        for source in sources:
            for attribute in names:
                value = getattr(source, attribute, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    heads = find(_HEADS)
    width = next((m.in_features for m in module.modules() if isinstance(m, nn.Linear)), None) or find(_WIDTHS)
    if heads is None or width is None:
        raise ValueError(
            f"the sizes of {name or 'the model'} ({type(module).__name__}) are not to be guessed: it has none of the "
            f"attributes {', '.join(_HEADS)}, or no nn.Linear. Pass example=(inputs of the model, ...) to "
            "swap_attention, which then looks at one forward"
        )
    return width, heads, find(_KV_HEADS) or heads


def make_gate(sizes: tuple[int, int, int], **arguments) -> Gate:
    return Gate(*sizes, **arguments)
