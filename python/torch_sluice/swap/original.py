"""What a transformers layer computes without Sluice: its attention function, and whether that is plain attention."""

import dis
import inspect
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torch_sluice.swap.code import codes_of, names_of

_TABLE = "ALL_ATTENTION_FUNCTIONS"
_EAGER = "eager_attention_forward"
# What every attention function takes, and what it is given for other kernels than the plain formula.
_UNDERSTOOD = {"attention_mask", "scaling", "dropout", "position_bias", "is_causal", "sliding_window", "kwargs"}
# Arguments that change what is computed: an implementation that is chosen by name alone must refuse them.
_CHANGING = ("sinks", "indices", "block_indices")


class Original(NamedTuple):
    """The attention function of a layer, as it was before the swap."""

    function: Callable
    implementation: str  # "sdpa" or "eager": it says what no mask means, and whether weights are given back
    sinks: bool = False  # the function adds the scores of ``module.sinks`` [heads] to every softmax
    reads: tuple[str, ...] = ()  # names of further arguments that change its result
    caps: bool = False  # the function takes softcap, and bends its scores by it
    by_name: bool = False  # nobody swapped the layer: its model was given attn_implementation="sluice"

    @property
    def is_eager(self) -> bool:
        return self.implementation == "eager"

    def wants_more(self, options: dict) -> bool:
        """Whether the call asks for what plain attention (with sinks) does not give: the weights, a cap, ..."""
        for name in self.reads:
            if options.get(name) is not None:
                return True
        if not self.is_eager:  # gives no weights
            return False
        if options.get("output_attentions"):
            return True
        capturing = sys.modules.get("transformers.utils.output_capturing")
        collected = None if capturing is None else capturing._active_collector.get()
        return bool(collected) and any("attention" in key for key in collected)


def by_name() -> Original:
    """For layers that were given ``attn_implementation="sluice"`` and no swap: the function of "sdpa" and its masks."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return Original(sdpa_attention_forward, "sdpa", reads=_CHANGING, caps=True, by_name=True)


def asks_for_table(module: nn.Module) -> bool:
    """Whether a method of module's class names the AttentionInterface."""
    return any(_TABLE in names_of(code) for code, _ in codes_of(type(module)))


def _compared_with(module: nn.Module) -> set[str]:
    """Strings that the class compares something with where it handles the name of its implementation."""
    found = set()
    for code, _ in codes_of(type(module)):
        if "_attn_implementation" not in names_of(code):
            continue
        last = None
        for instruction in dis.get_instructions(code):
            if instruction.opname in ("COMPARE_OP", "CONTAINS_OP") and last is not None:
                found |= set(last) if isinstance(last, (tuple, frozenset)) else {last}
            last = instruction.argval if instruction.opname == "LOAD_CONST" else None
    return found


def _function_of(module: nn.Module, implementation: str | None) -> Callable | str:
    """The attention function that the layer's forward would pick, or why it is not known."""
    functions = {}
    table = None
    for code, namespace in codes_of(type(module)):
        names = names_of(code)
        if _TABLE in names:
            table = table or namespace.get(_TABLE)
            functions |= {n: namespace[n] for n in names if n.endswith(_EAGER) and callable(namespace.get(n))}
    if implementation not in (None, "eager"):
        return (table or _shared_table())[implementation]
    if len(functions) != 1:
        return f"it has {len(functions)} eager attention functions, expected one"
    return next(iter(functions.values()))


def _shared_table():
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS


def original_of(module: nn.Module) -> Original | str:
    """The layer's attention function if the operator can take its place, else the reason why not."""
    implementation = module.config._attn_implementation
    if implementation == "sluice":
        return by_name()
    if implementation not in (None, "sdpa", "eager"):
        return (
            f"its attn_implementation is {implementation!r}, expected 'sdpa' or 'eager', whose masks can be read: call "
            "model.set_attn_implementation('sdpa') first"
        )
    compared = _compared_with(module)
    if (implementation or "eager") in compared:
        return f"its forward does something else unless its attn_implementation is {implementation!r}"
    function = _function_of(module, implementation)
    if isinstance(function, str):
        return function
    cap = getattr(module, "attn_logit_softcapping", None)
    if cap is not None and implementation == "sdpa":
        return (
            f"its attn_implementation 'sdpa' leaves out the cap of its scores (attn_logit_softcapping = {cap}): call "
            "model.set_attn_implementation('eager') first, which has it"
        )
    return _classify(module, function, "eager" if implementation is None else implementation)


def head_counts(module: nn.Module) -> tuple[int | None, int]:
    """(query heads, None where they are unknown; query heads of each key head), from the layer and its config."""
    sources = (module, module.config)
    found = (getattr(s, n, None) for s in sources for n in ("num_heads", "num_attention_heads", "n_heads"))
    groups = getattr(module, "num_key_value_groups", 1)
    return next((n for n in found if isinstance(n, int) and n > 0), None), groups if isinstance(groups, int) else 1


def _argument_names(function: Callable) -> tuple[str, ...]:
    """Names of arguments that a function takes, or looks for among its **kwargs, beyond those that are understood."""
    code = inspect.unwrap(function).__code__
    named = code.co_varnames[5 : code.co_argcount + code.co_kwonlyargcount]
    looked_for = ()
    if "get" in code.co_names or "pop" in code.co_names:
        looked_for = (c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return tuple(sorted({*named, *looked_for} - _UNDERSTOOD - {"output_attentions"}))


def _classify(module: nn.Module, function: Callable, implementation: str) -> Original | str:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if function is sdpa_attention_forward:
        return Original(function, implementation, reads=("softcap",))
    if not hasattr(inspect.unwrap(function), "__code__"):
        return (
            f"its attention function is a {type(function).__name__}, expected a function: its arguments can't be read"
        )
    reads = _argument_names(function)
    name = f"{function.__module__}.{function.__name__}"
    sinks = getattr(module, "sinks", None)
    caps = "softcap" in reads
    for candidate in (None, sinks) if isinstance(sinks, Tensor) else (None,):
        try:
            same = _is_attention_with(candidate, None, module, function)
            caps = same and caps and _is_attention_with(candidate, 1.5, module, function)
        except Exception as error:  # whatever it stumbles over, it isn't what it was taken for
            return f"its attention function {name} could not be tried on small tensors: {type(error).__name__}: {error}"
        if same:
            reads = tuple(name for name in reads if not (caps and name == "softcap"))
            return Original(function, implementation, candidate is not None, reads, caps)
    return f"its attention function {name} is not plain attention: tried on small random tensors, its results differ"


@torch.no_grad()
def _is_attention_with(sinks: Tensor | None, cap: float | None, module: nn.Module, function: Callable) -> bool:
    """Whether function is softmax(cap(scale * q k^T) + mask, with sinks) v, tried with a mask and without."""
    heads, groups = head_counts(module)
    heads = heads or 2 * groups if sinks is None else sinks.numel()
    devices = (p.device for p in module.parameters() if p.device.type != "meta")
    device = next(devices, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes):
        return torch.randn(*sizes, generator=generator).to(device)

    q, k, v = draw(2, heads, 3, 4), draw(2, heads // groups, 5, 4), draw(2, heads // groups, 5, 4)
    bias = draw(2, 1, 3, 5)
    dropped = bias.masked_fill(torch.tensor([False, False, True, False, True]).to(device), torch.finfo(bias.dtype).min)
    scores = 0.7 * q @ k.repeat_interleave(groups, 1).transpose(-1, -2)
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    for mask in (bias, dropped, None):
        options = dict(scaling=0.7, dropout=0.0, is_causal=False, sliding_window=1)
        options |= {} if cap is None else dict(softcap=cap)
        biased = scores if mask is None else scores + mask
        if sinks is not None:
            biased = torch.cat((biased, sinks.to(biased).view(1, -1, 1, 1).expand(2, -1, 3, 1)), dim=-1)
        expected = biased.softmax(-1)[..., :5] @ v.repeat_interleave(groups, 1)
        try:
            out = function(module, q, k, v, mask, **options)[0]
        except TypeError:
            if mask is None:  # it can't do without, so it is never called without
                continue
            raise
        if out.shape != (2, 3, heads, 4) or not torch.allclose(out.transpose(1, 2).float(), expected, atol=1e-5):
            return False
    return True
