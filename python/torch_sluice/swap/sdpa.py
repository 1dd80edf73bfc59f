"""Modules that call F.scaled_dot_product_attention or a marked function: caught while their forward runs."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_sluice.attention import Gate
from torch_sluice.swap.cache import GatedCache, cache_among, with_gates
from torch_sluice.swap.call import attend_gated, attend_open
from torch_sluice.swap.code import codes_of, names_of
from torch_sluice.swap.marked import Answers, marked_functions, marked_of
from torch_sluice.swap.marked_call import attend_marked
from torch_sluice.swap.marked_proof import Proof, prove

_CALLEE = "scaled_dot_product_attention"


def calls_sdpa(module: nn.Module) -> bool:
    """Whether a method of module's class (or a base class outside torch) names scaled_dot_product_attention."""
    return any(_CALLEE in names_of(code) for code, _ in codes_of(type(module)))


def first_input(args, kwargs) -> Tensor | None:
    """The layer's input: the first floating-point tensor [B, N, dim] among the arguments of its forward."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() == 3 and value.is_floating_point():
            return value
    return None


class _Interceptor(Answers):
    """Answers scaled_dot_product_attention in place of torch, and marked functions; every other one goes through."""

    def __init__(self, module: nn.Module, x: Tensor | None, logits: tuple | None):
        super().__init__()
        self.module, self.x, self.logits = module, x, logits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.unflatten:
            func = torch.unflatten  # the same; the method calls super(), which torch.compile can't trace from here
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        marked = getattr(func, "sluice_marked", None)
        if marked is None:
            return func(*args, **kwargs)
        call = marked.bind(args, kwargs)
        self._note(call.q, call.k)
        proof = self.module.forward.proof_of(func)
        return attend_marked(self.module, self._logits, marked, proof, call, args, kwargs)

    def _note(self, q: Tensor, k: Tensor) -> None:
        sizes = self.module.forward.sizes
        if sizes is not None and self.x is not None:
            sizes[self.module] = (self.x.shape[-1], q.shape[1], k.shape[1])

    def _logits(self):
        """(a, b, cache) of the layer's gate; b is of all keys that are looked at, once the cache was updated."""
        if self.x is None:
            raise ValueError(
                f"{type(self.module).__name__}.forward got no floating-point tensor [batch, tokens, dim], expected the "
                "layer's input: the gate reads it"
            )
        a, b = self.module.sluice_gate(self.x) if self.logits is None else self.logits
        cache = b if isinstance(b, GatedCache) else None
        return a, b if cache is None else cache.b, cache

    def _attend(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        self._note(query, key)
        gate = self.module.sluice_gate
        q, k, v, causal = query, key, value, is_causal
        regular = q.dim() == k.dim() == v.dim() == 4 and not (is_causal and q.shape[-2] > k.shape[-2])
        if regular and causal:
            # SDPA aligns its causal mask top-left: keys behind the last query are seen by nobody.
            k, v = k[:, :, : q.shape[2]], v[:, :, : q.shape[2]]
        mask = attn_mask
        if mask is not None and mask.dim() < 4:
            mask = mask[(None,) * (4 - mask.dim())]
        if mask is not None and getattr(self.module, "is_causal", False) is True:
            causal = True  # by its mask, which need not show it
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
        if mask is not None and is_causal:
            raise ValueError("is_causal is True and attn_mask is given, expected one of them")
        a, b, cache = self._logits()
        b = b[:, :, : k.shape[2]]
        causal = causal or (cache is not None and q.shape[2] == 1)  # decoders leave it out for one token
        out, _ = attend_gated(
            gate, (a, b), self.module.sluice_options, q, k, v, mask=mask, causal=causal, scale=scale,
            dropout=dropout_p, cache=cache,
        )  # fmt: skip
        return out


class InterceptedForward:
    """The forward of a swapped module: its own, with its attention answered by Sluice."""

    def __init__(self, module: nn.Module, proofs: dict[Callable, Proof]):
        self.module = module
        self.original = module.__dict__.get("forward")
        self.proofs = proofs  # of the marked functions that it goes through
        self.sizes = None  # a dict while measure() listens

    def __call__(self, *args, **kwargs):
        x, gate, logits = first_input(args, kwargs), self.module.sluice_gate, None
        name = None if gate is None or x is None else cache_among(kwargs)
        if name is not None:
            a, b = gate(x)
            kwargs, cache = with_gates(kwargs, name, b)
            logits = (a, cache)
        with _Interceptor(self.module, x, logits):
            if self.original is not None:
                return self.original(*args, **kwargs)
            return type(self.module).forward(self.module, *args, **kwargs)

    def proof_of(self, function: Callable) -> Proof:
        """Of a marked function; one that was not found at the swap is tried at its first call."""
        if function not in self.proofs:
            if torch.compiler.is_compiling():
                raise ValueError(
                    f"{marked_of(function).title} was not tried yet, and a compiler can't: run the model once before "
                    "it is compiled"
                )
            inside = (m for m in self.module.modules() if function in marked_functions(m))
            proof = prove(function, next(inside, self.module))
            if isinstance(proof, str):
                raise ValueError(f"{type(self.module).__name__}: {proof}")
            self.proofs[function] = proof
        return self.proofs[function]


def prove_marked(module: nn.Module, named: bool) -> dict[Callable, Proof] | str:
    """Proofs of the marked functions that the module goes through, as far as they are found; or why one fails."""
    proofs = {function: prove(function, owner) for function, owner in marked_functions(module, within=named).items()}
    return next((proof for proof in proofs.values() if isinstance(proof, str)), proofs)


def install(module: nn.Module, options, proofs: dict[Callable, Proof]) -> None:
    module.sluice_gate, module.sluice_options = None, options
    module.forward = InterceptedForward(module, proofs)


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


def make_gate(sizes: tuple[int, int, int], **arguments) -> Gate:
    return Gate(*sizes, **arguments)
