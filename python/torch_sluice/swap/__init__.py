"""Replaces the attention of an existing model in place, keeping its weights, and puts it back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import nn

from torch_sluice.attention import Gate
from torch_sluice.swap import hugging_face, multihead, sdpa
from torch_sluice.swap.call import GateOptions
from torch_sluice.swap.original import original_of
from torch_sluice.swap.verify import first_difference, record

__all__ = ["gate_parameters", "restore", "swap_attention"]


@dataclass
class _Swap:
    """What was changed in a model, so that it can be undone. Holds modules, not closures: a copy of the model works."""

    target_density: float | None
    layers: list = field(default_factory=list)  # transformers layers
    gated: list = field(default_factory=list)  # (transformers layer with a gate, hook)
    multiheads: list = field(default_factory=list)  # (module, its class, hook)
    owners: list = field(default_factory=list)  # modules that call scaled_dot_product_attention
    encoders: list = field(default_factory=list)  # nn.TransformerEncoder that made nested tensors

    def undo(self):
        for module in self.layers:
            hugging_face.uninstall(module)
        for module, hook in self.gated:
            hook.remove()
            hugging_face.remove_gate(module)
        for module, cls, hook in self.multiheads:
            hook.remove()
            del module.sluice_gate, module.sluice_options
            module.__class__ = cls
        for module in self.owners:
            sdpa.uninstall(module)
        for module in self.encoders:
            module.use_nested_tensor = True


def _chosen(model: nn.Module, modules) -> list[tuple[str, nn.Module]]:
    named = list(model.named_modules())
    if modules is None:
        return named
    if callable(modules):
        return [(name, module) for name, module in named if modules(name, module)]
    wanted, chosen = list(modules), []
    for entry in wanted:
        found = [(n, m) for n, m in named if m is entry or (isinstance(entry, str) and n == entry)]
        if not found:
            raise ValueError(f"modules has {entry!r}, expected names or modules of model.named_modules()")
        chosen += found
    return chosen


def swap_attention(
    model: nn.Module,
    *,
    target_density: float | None = None,
    tau: float = 0.5,
    opening: float = 0.95,
    window: int = 32,
    sinks: int = 4,
    modules: Iterable[str | nn.Module] | Callable[[str, nn.Module], bool] | None = None,
    example: tuple | dict | None = None,
) -> nn.Module:
    """Replaces the attention of ``model`` by Sluice's, in place. Its weights stay the tensors that they are.

    Without ``target_density`` the gates are exactly open: the model gives its old outputs within floating-point error,
    and has no new parameters. With it every self-attention layer gets a ``torch_sluice.attention.Gate`` as submodule
    ``sluice_gate``: new trainable parameters, part of ``model.parameters()`` and of its ``state_dict()``, at first
    ``g = opening`` everywhere. They learn with the model, under ``torch_sluice.attention.DensityController``. They are
    float32, whatever the model is: before FSDP2 shards it, call ``torch_sluice.attention.shard_gates``.

    Three kinds of attention are known, and may be mixed in one model:

    - layers of Hugging Face transformers models that use its AttentionInterface and whose own function, "sdpa" or
      "eager", is plain attention (it is tried on small tensors). They then ask for ``attn_implementation="sluice"``,
      which may also be set without this function, for open gates. Padding on the left or right of the causal or full
      mask, sliding windows and generation with any cache but quantised ones run on the operator. Cross attention stays
      open.
    - ``nn.MultiheadAttention``, also within ``nn.TransformerEncoderLayer`` and ``nn.TransformerDecoderLayer``.
    - modules that call ``F.scaled_dot_product_attention`` themselves: those of whose class some method names that
      function, and those given in ``modules``. Their calls are caught while their ``forward`` runs; the gate reads the
      first floating-point [B, N, dim] argument of that forward.

    With open gates, what the operator does not take (dropout, a bias or another pattern as mask, attention weights) is
    done as before the swap. With gates, dropout is an error, and other masks are computed densely, with a warning.

    Args:
        model: the model, of any kind above; training or not.
        target_density: share in (0, 1] of the pairs that shall be kept after training, to which
            ``DensityController(model, steps=...)`` drives the gates; None: no gates.
        tau: pairs with a gate below this are dropped, in [0, 1).
        opening: gate of all pairs at the start, in (0, 1).
        window: the last ``window`` keys of each query are kept and not gated.
        sinks: nor are the first ``sinks`` keys of each sequence, behind its padding.
        modules: the layers to swap, as names, modules, or a predicate (name, module) -> bool; default all.
        example: positional (tuple) or keyword (dict) inputs of the model. With them the swap proves itself: the model
            runs on them with open gates and as it was, and must give the same within rounding (1e-4 of the largest
            output in float32). They also tell the sizes of layers of the third kind where attributes do not.

    Returns:
        model.

    Raises:
        ValueError: the model has no attention of these kinds that computes what the operator does, gives other outputs
            on example, is swapped already, or an argument is out of its range. The model is then as it was.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}, expected an nn.Module")
    if any(hasattr(module, "_sluice_swap") for module in model.modules()):
        raise ValueError("model is swapped already, expected one that is not: call torch_sluice.restore(model) first")
    if target_density is not None and not 0 < target_density <= 1:
        raise ValueError(f"target_density is {target_density}, expected a number in (0, 1], or None for open gates")
    if window < 0 or sinks < 0:
        raise ValueError(f"window is {window} and sinks is {sinks}, expected both at least 0")
    options = GateOptions(window, sinks)
    if example is not None:
        _verify(model, options, modules, example)
    gate_arguments = dict(tau=tau, opening=opening, target_density=target_density)
    model._sluice_swap = _swap(model, target_density, options, modules, example, gate_arguments)
    return model


def _verify(model, options, modules, example) -> None:
    """Raises ValueError if the model with open gates gives other outputs on example than without Sluice."""
    swap = _swap(model, None, options, modules)
    swapped = [*swap.layers, *(module for module, *_ in swap.multiheads), *swap.owners]
    try:
        after = record(model, swapped, example)
    finally:
        swap.undo()
    found = first_difference(record(model, swapped, example), after)
    if found is not None:
        module, off = found
        name = next(name for name, m in model.named_modules() if m is module) or "the model"
        raise ValueError(
            f"{name} ({type(module).__name__}) gives other outputs on example with its attention swapped: they differ "
            f"by {off:.2g} of the largest. The model is as it was; leave this layer out of modules"
        )


def _swap(model, target_density, options, modules, example=None, gate_arguments=None) -> _Swap:
    """Swaps what can be swapped; on an error the model is as it was."""
    swap = _Swap(target_density)
    try:
        _fill(model, swap, options, modules, example, gate_arguments)
    except BaseException:
        swap.undo()
        raise
    return swap


def _fill(model, swap, options, modules, example, gate_arguments):
    learn = swap.target_density is not None
    chosen = _chosen(model, modules)
    refused = []

    def gate_for(module, make, *arguments):
        """A gate where the layer's weights are; float32 whatever they are (its steps are small)."""
        like = next((p for p in module.parameters() if p.is_floating_point()), None)
        device = None if like is None else like.device
        return make(*arguments, device=device, **gate_arguments) if learn else None

    layers = [(name, module) for name, module in chosen if hugging_face.is_attention(module)]
    if layers:
        hugging_face.register()
    for name, module in layers:
        original = original_of(module)
        parent = model.get_submodule(name.rpartition(".")[0]) if name else None
        cross = hugging_face.is_cross_attention(name, module, parent)
        if not isinstance(original, str) and original.sinks and learn and not cross:
            original = "its attention sinks take a share of every softmax"
        if isinstance(original, str):
            refused.append((name, module, original))
            continue
        hugging_face.install(module, original)
        swap.layers.append(module)
        if learn and not cross:
            gate = gate_for(module, hugging_face.make_gate, name, module)
            swap.gated.append((module, hugging_face.add_gate(module, gate, options)))

    for name, module in chosen:
        if isinstance(module, nn.MultiheadAttention):
            reason = multihead.why_not(module)
            if reason:
                refused.append((name, module, reason))
                continue
            cls = type(module)
            if cls is not nn.MultiheadAttention:
                refused.append((name, module, f"it is a {cls.__name__}, a subclass of nn.MultiheadAttention"))
                continue
            gate = gate_for(module, multihead.make_gate, module)
            hook = module.register_forward_pre_hook(multihead._no_fast_path)
            module.sluice_gate, module.sluice_options = gate, options
            module.__class__ = multihead.SluiceMultiheadAttention
            swap.multiheads.append((module, cls, hook))
    if swap.multiheads:
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False):
                module.use_nested_tensor = False
                swap.encoders.append(module)

    done = {id(module) for _, module in layers} | {id(module) for module, *_ in swap.multiheads}
    named = modules is not None and not callable(modules)
    owners = [
        (name, module)
        for name, module in chosen
        if id(module) not in done
        and not isinstance(module, nn.MultiheadAttention)
        and (named or sdpa.calls_sdpa(module))
    ]
    for _, module in owners:
        sdpa.install(module, options)
        swap.owners.append(module)
    if owners and learn:
        sizes = {} if example is None else sdpa.measure(model, swap.owners, example)
        for name, module in owners:
            if example is not None and module not in sizes:
                raise ValueError(
                    f"{name or 'the model'} ({type(module).__name__}) did not call scaled_dot_product_attention with a "
                    "layer input [batch, tokens, dim] in a forward on example, expected it to: leave it out of modules"
                )
            found = sizes[module] if example is not None else sdpa.guess_sizes(name, module)
            module.sluice_gate = gate_for(module, sdpa.make_gate, found)

    if not (swap.layers or swap.multiheads or owners):
        known = {id(module) for _, module, _ in refused}
        refused += [
            (name, m, "it computes attention itself") for name, m in _own_attention(chosen) if id(m) not in known
        ]
        raise ValueError(
            f"model is a {type(model).__name__} without attention that can be swapped, expected Hugging Face "
            "transformers attention, nn.MultiheadAttention, or modules that call F.scaled_dot_product_attention"
            + (f". Left alone: {_sentences(refused)}" if refused else "")
        )
    if refused and learn:
        raise ValueError(f"these layers take no gate: {_sentences(refused)}. Choose the others by modules=")


def _own_attention(chosen: list[tuple[str, nn.Module]]) -> list[tuple[str, nn.Module]]:
    """Modules that are attention by their class's name, and hold none: what an error names."""
    return [
        (name, module)
        for name, module in chosen
        if "attention" in type(module).__name__.lower()
        and not any("attention" in type(m).__name__.lower() for m in module.modules() if m is not module)
    ]


def _sentences(refused: list[tuple[str, nn.Module, str]]) -> str:
    """One sentence for each kind of layer and reason, and not for each of hundreds of layers."""
    kinds = {}
    for name, module, reason in refused:
        kinds.setdefault((type(module).__name__, reason), []).append(name or "the model itself")
    return "; ".join(
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} ({kind}): {reason}"
        for (kind, reason), names in kinds.items()
    )


def restore(model: nn.Module) -> nn.Module:
    """Undoes :func:`swap_attention`: the model's forward, config, hooks and ``state_dict`` keys are what they were.

    Gates are dropped; keep ``model.state_dict()`` first if they shall not be lost. Returns model.

    Raises:
        ValueError: model was not swapped.
    """
    swap = getattr(model, "_sluice_swap", None)
    if swap is None:
        raise ValueError("model is not swapped, expected the one that was given to torch_sluice.swap_attention")
    swap.undo()
    del model._sluice_swap
    return model


def gate_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all gates of a model, for a learning rate of their own (5 to 20 times) and no weight decay::

    gates = torch_sluice.gate_parameters(model)
    others = [p for p in model.parameters() if all(p is not g for g in gates)]
    optimizer = torch.optim.AdamW(
        [{"params": others, "lr": lr}, {"params": gates, "lr": 10 * lr, "weight_decay": 0.0}]
    )
    """
    return [p for module in model.modules() if isinstance(module, Gate) for p in module.parameters()]


hugging_face.register_when_imported()
