"""Sluice as an attention implementation of Hugging Face transformers, and gates on its attention layers."""

import functools
import importlib.abc
import importlib.util
import re
import sys

import torch
from torch import nn

from torch_sluice.attention import Gate
from torch_sluice.swap import in_flight
from torch_sluice.swap.cache import GatedCache, cache_among, cross_layer, with_gates
from torch_sluice.swap.cache_layer import b_beside, put_beside
from torch_sluice.swap.call import MAX_HEAD_DIM, GateOptions, attend_gated, attend_open
from torch_sluice.swap.config_view import view_config
from torch_sluice.swap.original import Original, asks_for_table, by_name, head_counts
from torch_sluice.swap.sdpa import first_input
from torch_sluice.swap.weights import LazyWeights

NAMES = {"sdpa": "sluice", "eager": "sluice_eager"}
_TRIGGER = "transformers.modeling_utils"
_KEY_NAMES = ("key_value_states", "encoder_hidden_states")
_CROSS = re.compile("cross|enc_?dec|encoder_attn")


def sluice_attention(module, query, key, value, attention_mask=None, dropout=0.0, scaling=None, **options):
    """The function behind ``attn_implementation="sluice"``: query [B, Hq, Nq, D] and so on -> [B, Nq, Hq, Dv], weights.

    Without a gate on the module it is what the layer computed before, on the operator where that takes it; what it
    does not take (dropout, position biases, masks beyond padding and windows) goes the old way. The weights are None,
    as those of "sdpa" are; where "eager" gave some, they are there.
    """
    original = getattr(module, "sluice_original", None) or by_name()
    _check_call(module, original, options)
    bias, is_causal = options.get("position_bias"), options.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and original.is_eager:
        is_causal = False  # the eager functions know no causality but their mask's
    logits = in_flight.take(module) if "sluice_gate" in module._modules else None
    if logits is not None:
        mask, given = attention_mask, dict(causal=is_causal, scale=scaling, dropout=dropout)
        return _attend_gated(module, logits, original, (query, key, value), mask, bias, given, options)
    if "sluice_gate" in module._modules:
        raise ValueError(
            f"{_describe(module)} asks for attention more than once in a forward, expected once: its gate reads one "
            "input; leave it out of modules"
        )
    out = None
    if not dropout and not original.wants_more(options) and _adds_nothing(bias):
        q, k, v = query, key, value
        sinks, cap = _sink_logits(module, original, options), options.get("softcap")
        if attention_mask is None and is_causal:
            k, v = _cut_to_queries(q, k, v)
        if not (attention_mask is None and is_causal and q.shape[2] > k.shape[2]):
            given = dict(mask=attention_mask, causal=is_causal, scale=scaling, softcap=cap)
            out = attend_open(q, k, v, sinks=sinks, sliding_window=options.get("sliding_window"), **given)

    def compute_the_old_way():
        for name in ("softcap", "s_aux") if original.by_name else ():
            if options.get(name) is not None:
                raise ValueError(
                    f"attn_implementation='sluice' does not support {name} together with dropout, a position bias, or "
                    "a mask beyond padding and windows; try 'eager'"
                )
        return original.function(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options)

    if out is None:
        return compute_the_old_way()
    weights = None
    if original.is_eager:
        weights = _weights(lambda: compute_the_old_way()[1], query, key, value, attention_mask)
    return out.transpose(1, 2).contiguous(), weights


def _weights(compute, query, key, *others):
    """Weights for layers that always gave some. A compiler leaves them out by itself where nobody looks."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return compute()
    sources = [x for x in (query, key, *others) if x is not None]
    return LazyWeights((*query.shape[:3], key.shape[2]), compute, sources)


def _check_call(module, original, options) -> None:
    if original.by_name:
        for name in original.reads:
            if options.get(name) is not None:
                raise ValueError(
                    f"attn_implementation='sluice' does not support {name}, which this model uses; try 'eager'"
                )
    elif not torch.compiler.is_compiling():
        # Past the __getattribute__ of configs, which is Python: this is done at every call.
        config = object.__getattribute__(module.config, "sluice_config")
        implementation = object.__getattribute__(config, "_attn_implementation_internal") or "eager"
        if implementation != original.implementation:
            raise ValueError(
                f"the model's attn_implementation is {implementation!r} and was {original.implementation!r} when its "
                "attention was swapped: call torch_sluice.restore(model) before it is set"
            )


def _sink_logits(module, original, options):
    """[Hq], scores of keys without a value: the layer's, or those that a layer which was not swapped hands over."""
    if original.by_name:
        return options.get("s_aux")
    return module.sinks if original.sinks else None


def _adds_nothing(bias) -> bool:
    if bias is None:
        return True
    return not bias.requires_grad and not torch.compiler.is_compiling() and not bias.any()


def _cut_to_queries(q, *keyed):
    """The first forward into a cache of fixed size: the keys behind the queries are not there yet."""
    n_q, n_k = q.shape[2], keyed[0].shape[2]
    return tuple(x[:, :, :n_q] for x in keyed) if n_k > n_q > 1 else keyed


def _attend_gated(module, logits, original, qkv, mask, bias, given, options):
    """A layer with a gate: its bias, if any, is part of the mask, so that it is computed densely."""
    for name in original.reads:
        if options.get(name) is not None:
            raise ValueError(f"{name} is given, expected None: a gated layer does not take it")
    (q, k, v), (a, b), n_k, causal = qkv, logits, qkv[1].shape[2], given["causal"]
    if mask is None and causal:
        k, v = _cut_to_queries(q, k, v)
    if not _adds_nothing(bias):
        from transformers.integrations.sdpa_attention import create_position_bias_mask

        bias = bias[..., : k.shape[2]] if bias.shape[-1] == n_k else bias
        mask = create_position_bias_mask(bias, mask, causal and q.shape[2] > 1, q, k)
    cache = b if isinstance(b, GatedCache) else None
    if cache is not None:
        cache.complete(n_k, getattr(module, "layer_idx", None))
    b = (b if cache is None else cache.b)[:, :, : k.shape[2]]
    if (a.shape[-1], b.shape[-1]) != (q.shape[2], k.shape[2]):
        raise ValueError(
            f"{_describe(module)} attends from {q.shape[2]} to {k.shape[2]} tokens, and its gate saw {a.shape[-1]} and "
            f"{b.shape[-1]}, expected the same numbers: it takes no gate, leave it out of modules"
        )
    given = dict(mask=mask, cache=cache, sliding_window=options.get("sliding_window"), **given)
    given |= dict(sink_logits=_sink_logits(module, original, options), softcap=options.get("softcap"))
    out, weights = attend_gated(module.sluice_gate, (a, b), module.sluice_options, q, k, v, **given)
    out = out.transpose(1, 2).contiguous()
    if not original.is_eager:
        return out, None
    return out, weights() if original.wants_more(options) else _weights(weights, q, k, mask, a, b)


def register() -> None:
    """Makes ``attn_implementation="sluice"`` known to transformers, with the masks of ``"sdpa"``.

    Layers that were "eager" before a swap go by a name of their own: should they make masks, these stay eager ones.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    for name, of in NAMES.items():
        AttentionInterface.register(of, sluice_attention)
        AttentionMaskInterface.register(of, ALL_MASK_ATTENTION_FUNCTIONS[name])


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
    return hasattr(getattr(module, "config", None), "_attn_implementation") and asks_for_table(module)


def install(module: nn.Module, original: Original) -> None:
    """Lets an attention layer ask for Sluice; the config of its model, and so the masks, stay what they are."""
    module.sluice_original = original
    if not original.by_name:
        module.config = view_config(module.config, NAMES[original.implementation])


def uninstall(module: nn.Module) -> None:
    del module.sluice_original
    in_flight.drop(module)
    module.config = getattr(module.config, "sluice_config", module.config)


def is_cross_attention(name: str, module: nn.Module, parent: nn.Module | None = None) -> bool:
    """Whether the layer looks at another sequence than its input: its name, its class or its parent's class says so."""
    words = " ".join((*name.split(".")[-2:], type(module).__name__, type(parent).__name__ if parent else "")).lower()
    return bool(getattr(module, "is_cross_attention", False) or _CROSS.search(words))


def make_gate(name: str, module: nn.Module, cross: bool = False, **arguments) -> Gate:
    """A gate of the layer's sizes; raises ValueError where they are not to be had."""
    heads, groups = head_counts(module)
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    width = linears[0].in_features if linears else getattr(module.config, "hidden_size", None)
    head_dim = getattr(module, "head_dim", None)
    if not heads or not isinstance(width, int) or (isinstance(head_dim, int) and head_dim > MAX_HEAD_DIM):
        raise ValueError(
            f"{name} ({type(module).__name__}) has {heads} heads of {head_dim} channels and reads {width}, expected "
            f"known numbers and at most {MAX_HEAD_DIM} channels: it takes no gate, leave it out of modules"
        )
    widths = {m.in_features for m in linears[:3]}
    if cross and len(widths) > 1:
        raise ValueError(
            f"{name} ({type(module).__name__}) makes its queries and keys of {sorted(widths)} channels, expected one "
            "number, which its gate reads: leave it out of modules"
        )
    return Gate(width, heads, heads // groups, **arguments)


def _hidden_states(module, args, kwargs):
    hidden_states = args[0] if args else kwargs.get("hidden_states")
    if hidden_states is None:
        raise ValueError(
            f"{_describe(module)} was called without hidden_states, expected them first or by name: the gate reads "
            "them; leave the layer out of modules"
        )
    return hidden_states.unsqueeze(0) if hidden_states.dim() == 2 else hidden_states


def _compute_logits(module, args, kwargs):
    """Forward pre-hook of a gated layer: its input is the gate's; the layer's cache is made to keep b."""
    a, b = module.sluice_gate(_hidden_states(module, args, kwargs))
    kwargs, b = with_gates(kwargs, cache_among(kwargs), b)
    in_flight.put(module, (a, b))
    return args, kwargs


def _compute_cross_logits(module, args, kwargs):
    """The same for cross attention, whose keys are made of another input: as they are kept, so is their b."""
    hidden_states = _hidden_states(module, args, kwargs)
    given = (kwargs.get(name) for name in _KEY_NAMES)
    keys = next((x for x in given if x is not None), None)
    keys = first_input(args[1:], {}) if keys is None else keys
    if keys is None:
        raise ValueError(
            f"{_describe(module)} was called without {' or '.join(_KEY_NAMES)}, expected what its keys are made of: "
            "the gate reads it; leave the layer out of modules"
        )
    layer, filled = cross_layer(kwargs, getattr(module, "layer_idx", None))
    kept = b_beside(layer) if filled else None
    a, b = module.sluice_gate(hidden_states, keys if kept is None else keys[:, :0])
    if kept is not None:
        b = kept
    elif layer is not None:
        put_beside(layer, b)
    in_flight.put(module, (a, b))


def _describe(module: nn.Module) -> str:
    """A layer with a gate, for errors."""
    return f"{module.sluice_name or 'the model'} ({type(module).__name__})"


def add_gate(name: str, module: nn.Module, gate: Gate, options: GateOptions, cross: bool = False):
    """Gives an attention layer its gate; returns the handle of the hook."""
    module.sluice_gate, module.sluice_name = gate, name
    module.sluice_options = options._replace(window=0) if cross else options
    hook = _compute_cross_logits if cross else _compute_logits
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def remove_gate(module: nn.Module) -> None:
    del module.sluice_gate, module.sluice_options, module.sluice_name
