"""What compression changed in a model's structure, as plain values: enough to do it again to a fresh model.

Nothing of it is code: sizes of known attributes, shapes of tensors, and the few kinds of layer in ``_KINDS``.
"""

from typing import Any

import torch
from torch import nn

from torch_sluice.compress.embedding import QuantizedEmbedding
from torch_sluice.compress.quantization import forgo_fast_paths
from torch_sluice.compress.quantized import QuantizedConv2d, QuantizedLinear

_KINDS = {"QuantizedLinear": QuantizedLinear, "QuantizedConv2d": QuantizedConv2d}
_KINDS |= {"QuantizedEmbedding": QuantizedEmbedding, "Identity": nn.Identity}
# Attributes that hold sizes, in the modules that pruning cuts.
_SIZES = (
    *("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_channels"),
    *("normalized_shape", "embedding_dim", "num_parameters", "embed_dim", "kdim", "vdim", "head_dim", "dim"),
    *("heads", "kv_heads", "num_heads", "num_attention_heads", "n_heads", "num_attn_heads", "num_key_value_heads"),
    *("all_head_size", "inner_dim"),
)


def describe_changes(original: nn.Module, compressed: nn.Module) -> dict[str, Any]:
    """{"modules": new layers, "sizes": changed attributes, "tensors": changed or new shapes}, by name; and "original",
    the shapes of all tensors before, by which the model that a file belongs to is known."""
    modules, sizes, tensors = {}, {}, {}
    before = dict(original.named_modules())
    inside: list[str] = []
    for name, module in compressed.named_modules():
        old = before.get(name)
        if old is None or any(name.startswith(prefix) for prefix in inside):
            continue
        kind = type(module).__name__
        if type(module) is not type(old) and _KINDS.get(kind) is type(module):
            modules[name] = {"kind": kind, **(module.config() if hasattr(module, "config") else {})}
            inside.append(name + ".")
            continue
        changed = {}
        for attribute in _SIZES:
            value = module.__dict__.get(attribute)
            if isinstance(value, (int, tuple)) and value != old.__dict__.get(attribute):
                changed[attribute] = list(value) if isinstance(value, tuple) else value
        if changed:
            sizes[name] = changed
        for kind, own in (("parameter", module._parameters), ("buffer", module._buffers)):
            for leaf, tensor in own.items():
                former = getattr(old, leaf, None)
                if tensor is not None and (former is None or former.shape != tensor.shape):
                    full = f"{name}.{leaf}" if name else leaf
                    tensors[full] = {"kind": kind, "shape": list(tensor.shape)}
    shapes = {name: list(tensor.shape) for name, tensor in _tensors(original).items()}
    return {"modules": modules, "sizes": sizes, "tensors": tensors, "original": shapes}


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state_dict without what modules add to it that is no tensor."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def _check_original(model: nn.Module, shapes: dict[str, list[int]]) -> None:
    own = {name: list(tensor.shape) for name, tensor in _tensors(model).items()}
    for name in (*shapes, *own):
        if own.get(name) != shapes.get(name):
            raise ValueError(f"its {name} has shape {own.get(name)}, and {shapes.get(name)} in the compressed one")


def make_changes(model: nn.Module, changes: dict[str, Any]) -> None:
    """Gives a model, in place, the structure that was described. Values of tensors are left to ``load_state_dict``.

    Raises:
        ValueError: the changes do not fit the model, or name what is not known here.
    """
    _check_original(model, changes["original"])
    tied = _tied(model)
    for name, spec in changes["modules"].items():
        spec = dict(spec)
        kind = _KINDS.get(spec.pop("kind", None))
        if kind is None or not _has(model, name):
            raise ValueError(
                f"a layer {name!r} of kind {changes['modules'][name].get('kind')!r} does not fit the model"
            )
        module = nn.Identity() if kind is nn.Identity else kind(**spec)
        old = model.get_submodule(name)
        model.set_submodule(name, module.train(old.training))
    for name, attributes in changes["sizes"].items():
        if not _has(model, name):
            raise ValueError(f"the model has no module {name!r}")
        for attribute, value in attributes.items():
            if attribute not in _SIZES:
                raise ValueError(f"an attribute {attribute!r} of {name!r} is none that compression changes")
            setattr(model.get_submodule(name), attribute, tuple(value) if isinstance(value, list) else value)
    for name, spec in changes["tensors"].items():
        owner, _, leaf = name.rpartition(".")
        if not _has(model, owner):
            raise ValueError(f"the model has no module {owner!r}")
        module = model.get_submodule(owner)
        like = getattr(module, leaf, None)
        like = like if like is not None else next(module.parameters(), torch.empty(0))
        tensor = torch.zeros(spec["shape"], dtype=like.dtype, device=like.device)
        if spec["kind"] == "parameter":
            module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=like.requires_grad))
        else:
            module.register_buffer(leaf, tensor)
    for first, *others in tied:
        for name in others:
            owner, _, leaf = name.rpartition(".")
            if _has_parameter(model, first) and _has_parameter(model, name):
                one, other = model.get_parameter(first), model.get_parameter(name)
                if one.shape == other.shape:
                    setattr(model.get_submodule(owner), leaf, one)
    if changes["modules"]:
        if any(spec["kind"] != "Identity" for spec in changes["modules"].values()):
            model.requires_grad_(False)
        forgo_fast_paths(model)


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _has_parameter(model: nn.Module, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


def _tied(model: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [shared for shared in names.values() if len(shared) > 1]
