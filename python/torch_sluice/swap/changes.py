"""What a swap changes in a model: finds the layers of all kinds, changes those that can be, and puts them back."""

from dataclasses import dataclass, field

from torch import nn

from torch_sluice.swap import hugging_face, multihead, sdpa
from torch_sluice.swap.marked import is_forward, marked_functions
from torch_sluice.swap.original import original_of
from torch_sluice.swap.sdpa_sizes import guess_sizes
from torch_sluice.swap.verify import first_difference, record

_BY_ITSELF = "it computes attention itself"
_ADVICE = (
    "Where a layer computes attention itself, put that into a function or method and mark it by "
    "torch_sluice.attention_function; where it calls F.scaled_dot_product_attention or a marked function through a "
    "helper outside of its class, name the layer in modules="
)


@dataclass
class Swap:
    """What was changed in a model, so that it can be undone. Holds modules, not closures: a copy of the model works."""

    target_density: float | None
    arguments: dict = field(default_factory=dict)  # of swap_attention, that a file of gates holds
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


def _choose(model: nn.Module, modules) -> list[tuple[str, nn.Module]]:
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


def verify(model, options, modules, example) -> None:
    """Raises ValueError if the model with open gates gives other outputs on example than without Sluice."""
    swap = swap_layers(model, None, options, modules)
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


def try_gates(model, example) -> None:
    """Raises ValueError if a layer that was given a gate can't have one, as a forward on example shows."""
    record(model, [], example)


def swap_layers(model, target_density, options, modules, example=None, gate_arguments=None, cross=False) -> Swap:
    """Swaps what can be swapped; on an error the model is as it was."""
    swap = Swap(target_density)
    try:
        _fill(model, swap, options, modules, example, gate_arguments, cross)
    except BaseException:
        swap.undo()
        raise
    return swap


def _fill(model, swap, options, modules, example, gate_arguments, with_cross):
    learn = swap.target_density is not None
    chosen = _choose(model, modules)
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
        if isinstance(original, str):
            refused.append((name, module, original))
            continue
        hugging_face.install(module, original)
        swap.layers.append(module)
        if learn and (with_cross or not cross):
            gate = gate_for(module, hugging_face.make_gate, name, module, cross)
            swap.gated.append((module, hugging_face.add_gate(name, module, gate, options, cross)))

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
    owners = []
    for name, module in _callers(model, chosen, done, named):
        proofs = sdpa.prove_marked(module, named)
        if isinstance(proofs, str):
            refused.append((name, module, proofs))
            continue
        sdpa.install(module, options, proofs)
        swap.owners.append(module)
        owners.append((name, module))
    if owners and learn:
        sizes = {} if example is None else sdpa.measure(model, swap.owners, example)
        for name, module in owners:
            if example is not None and module not in sizes:
                raise ValueError(
                    f"{name or 'the model'} ({type(module).__name__}) did not call scaled_dot_product_attention or a "
                    "marked function with a layer input [batch, tokens, dim] in a forward on example, expected it to: "
                    "leave it out of modules"
                )
            found = sizes[module] if example is not None else guess_sizes(name, module)
            module.sluice_gate = gate_for(module, sdpa.make_gate, found)

    if not (swap.layers or swap.multiheads or owners):
        known = {id(module) for _, module, _ in refused}
        refused += [(name, m, _BY_ITSELF) for name, m in _own_attention(chosen) if id(m) not in known]
        raise ValueError(
            f"model is a {type(model).__name__} without attention that can be swapped, expected Hugging Face "
            "transformers attention, nn.MultiheadAttention, or modules that call F.scaled_dot_product_attention or a "
            "function that torch_sluice.attention_function marks"
            + (f". Left alone: {_sentences(refused)}" if refused else "")
            + f". {_ADVICE}"
        )
    if refused and learn:
        raise ValueError(f"these layers take no gate: {_sentences(refused)}. Choose the others by modules=")


def _callers(model, chosen, done: set[int], named: bool) -> list[tuple[str, nn.Module]]:
    """Modules that call attention functions. One whose forward is such a function sees no input of a layer, unlike the
    module around it, which stands in for it."""
    found, by_name = {}, dict(model.named_modules())
    for name, module in chosen:
        if id(module) in done or isinstance(module, nn.MultiheadAttention):
            continue
        if not (named or sdpa.calls_sdpa(module) or marked_functions(module)):
            continue
        while not named and name and (is_forward(module) or isinstance(module, (nn.ModuleList, nn.ModuleDict))):
            name = name.rpartition(".")[0]
            module = by_name[name]
        found.setdefault(id(module), (name, module))
    return list(found.values())


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
