"""Sluice as an attention implementation of Hugging Face transformers, and gates on its attention layers."""

import functools
import importlib.abc
import importlib.util
import inspect
import sys

from torch import nn

from torch_sluice.attention import Gate
from torch_sluice.swap.cache import GatedCache
from torch_sluice.swap.call import GateOptions, attend_gated, attend_open

IMPLEMENTATION = "sluice"
_TRIGGER = "transformers.modeling_utils"
_CACHE_NAMES = ("cache", "past_key_values", "past_key_value")


def sluice_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None, position_bias=None, **kwargs
):
    """The function behind ``attn_implementation="sluice"``: query [B, Hq, Nq, D] and so on -> [B, Nq, Hq, Dv], None.

    Without a gate on the module it is plain attention, and what the operator does not take (dropout, position biases,
    masks beyond padding) goes the way of ``"sdpa"``.
    """
    for name in ("softcap", "s_aux"):
        if kwargs.get(name) is not None:
            raise ValueError(
                f"attn_implementation='sluice' does not support {name}, which this model uses; try 'eager'"
            )
    n_q, n_k = query.shape[2], key.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    logits = getattr(module, "_sluice_logits", None)
    if logits is not None:
        module._sluice_logits = None
    mask = attention_mask
    if position_bias is None and mask is None and is_causal and n_k > n_q > 1:
        # The first forward into a cache of fixed size: the keys behind the queries are not there yet.
        key, value, n_k = key[:, :, :n_q], value[:, :, :n_q], n_q
    if logits is None:
        out = None
        if not dropout and position_bias is None:
            out = attend_open(query, key, value, mask=mask, causal=is_causal, scale=scaling)
        if out is None:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal,
                **({} if position_bias is None else {"position_bias": position_bias}), **kwargs,
            )  # fmt: skip
    else:
        if position_bias is not None:
            raise ValueError("position_bias is given, expected None: a gated layer takes no bias on its scores")
        a, b = logits
        b = (b.b if isinstance(b, GatedCache) else b)[:, :, :n_k]
        out, _ = attend_gated(
            module.sluice_gate, (a, b), module.sluice_options, query, key, value, mask=mask, causal=is_causal,
            scale=scaling, dropout=dropout,
        )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def register() -> None:
    """Makes ``attn_implementation="sluice"`` known to transformers, with the masks of ``"sdpa"``."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, sluice_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class _RegisterOnImport(importlib.abc.MetaPathFinder):
    """Waits for transformers to be imported, and registers then: importing torch_sluice need not import it."""

    def find_spec(self, fullname, path, target=None):
        if fullname != _TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            @functools.wraps(execute)
            def execute_and_register(module):
                execute(module)
                register()

            spec.loader.exec_module = execute_and_register
        return spec


def register_when_imported() -> None:
    """Registers now if transformers is there, else when it comes."""
    if _TRIGGER in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _RegisterOnImport())


def is_attention(module: nn.Module) -> bool:
    """Whether module asks the AttentionInterface for its attention: it names the table of implementations."""
    if not hasattr(getattr(module, "config", None), "_attn_implementation"):
        return False
    forward = inspect.unwrap(type(module).forward)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(forward, "__code__", is_attention.__code__).co_names


def is_cross_attention(name: str, module: nn.Module) -> bool:
    last = name.rpartition(".")[2].lower()
    return getattr(module, "is_cross_attention", False) or "cross" in last or last == "encoder_attn"


def make_gate(module: nn.Module, **arguments) -> Gate:
    config = module.config
    heads = getattr(module, "num_heads", None) or config.num_attention_heads
    kv_heads = heads // getattr(module, "num_key_value_groups", 1)
    return Gate(config.hidden_size, heads, kv_heads, **arguments)


def _compute_logits(module, args, kwargs):
    """Forward pre-hook of a gated layer: its input is the gate's; the layer's cache is made to keep b."""
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    if hidden_states is None:
        raise ValueError(
            f"{type(module).__name__} was called without hidden_states, expected them first or by name: the gate "
            "reads them"
        )
    module._sluice_logits = None
    a, b = module.sluice_gate(hidden_states)
    for name in _CACHE_NAMES:
        cache = kwargs.get(name)
        if cache is not None:
            cache = GatedCache(getattr(cache, "self_attention_cache", cache), b)
            kwargs, b = {**kwargs, name: cache}, cache
            break
    module._sluice_logits = (a, b)
    return args, kwargs


def add_gate(module: nn.Module, gate: Gate, options: GateOptions):
    """Gives an attention layer its gate; returns the handle of the hook."""
    module.sluice_gate = gate
    module.sluice_options = options
    return module.register_forward_pre_hook(_compute_logits, with_kwargs=True)


def remove_gate(module: nn.Module) -> None:
    del module.sluice_gate, module.sluice_options
    module.__dict__.pop("_sluice_logits", None)


def configs_of(model: nn.Module) -> list:
    """Every config of a model that names an attention implementation, sub-configs included."""
    found, queue = {}, [module.config for module in model.modules() if is_attention(module)]
    queue += [m.config for m in model.modules() if hasattr(getattr(m, "config", None), "_attn_implementation_internal")]
    while queue:
        config = queue.pop()
        if id(config) in found or not hasattr(config, "_attn_implementation_internal"):
            continue
        found[id(config)] = config
        queue += [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return list(found.values())
