"""What compression changed in a model's structure, as plain values: enough to do it again to a fresh model.

Nothing of it is code: sizes that modules keep as attributes, shapes of tensors, options of quantised weights, and norms
that were folded away.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.compress.layers import forgo_fast_paths
from torch_sluice.compress.multihead import SlicedMultiheadAttention
from torch_sluice.compress.quantized import Options, QuantizedWeight, check_parts
from torch_sluice.compress.slicing import all_names

TRANSIENT = "transient"  # kind of a buffer that the state_dict has not
PARTS = ("packed", "scale")  # names of a quantised weight's tensors in a file, behind its own


@dataclass
class Weight:
    """One quantised weight: the names of the parameters that it is, several where it is tied, and what it is."""

    places: list[str]
    options: Options
    tensor: QuantizedWeight | None = field(default=None, repr=False)

    def as_plain(self) -> dict[str, Any]:
        values = self.options._asdict()
        values["dtype"] = str(values["dtype"]).removeprefix("torch.")
        return {"places": self.places, **values, "shape": list(values["shape"])}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> "Weight":
        """Raises ValueError for what is no weight."""
        values = dict(values)
        places = values.pop("places", None)
        names = set(Options._fields)
        if not isinstance(places, list) or not places or not all(isinstance(place, str) for place in places):
            raise ValueError(f"a quantised weight has places {places!r}, expected names of parameters")
        if set(values) != names:
            raise ValueError(f"{places[0]} has options {sorted(values)}, expected {sorted(names)}")
        shape, dtype = values["shape"], getattr(torch, str(values["dtype"]), None)
        if not isinstance(shape, list) or not isinstance(dtype, torch.dtype):
            raise ValueError(f"{places[0]} has shape {shape!r} of {values['dtype']!r}, expected sizes and a dtype")
        options = Options(**{**values, "shape": tuple(shape), "dtype": dtype})
        options.check()
        return cls(places, options)


def find_weights(model: nn.Module) -> list[Weight]:
    """The quantised weights of a model."""
    found: dict[int, Weight] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if isinstance(parameter, QuantizedWeight):
            found.setdefault(id(parameter), Weight([], parameter.options, parameter)).places.append(name)
    return list(found.values())


def describe_changes(original: nn.Module, compressed: nn.Module) -> dict[str, Any]:
    """{"modules": norms that are folded, attention that another class runs, "sizes": changed attributes, "tensors":
    changed or new shapes}, by name;
    "weights": the quantised ones; and "original", the shapes of all tensors before, by which the model that a file
    belongs to is known. Of a model that was compressed before, what was done then is in it, too."""
    modules: dict[str, Any] = {}
    sizes: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Any] = {}
    shapes = {name: list(tensor.shape) for name, tensor in _tensors(original).items()}
    earlier = getattr(getattr(original, "compression_report", None), "changes", None)
    if earlier:
        modules, tensors, shapes = dict(earlier["modules"]), dict(earlier["tensors"]), earlier["original"]
        sizes = {name: dict(attributes) for name, attributes in earlier["sizes"].items()}
    before = dict(original.named_modules())
    for name, module in compressed.named_modules():
        old = before.get(name)
        if old is None:
            continue
        if type(module) is nn.Identity and type(old) is not nn.Identity:
            modules[name] = {"kind": "Identity"}
            tensors = {full: spec for full, spec in tensors.items() if not full.startswith(f"{name}.")}
            sizes.pop(name, None)
            continue
        if type(module) is SlicedMultiheadAttention and type(old) is nn.MultiheadAttention:
            modules[name] = {"kind": "SlicedMultiheadAttention"}
        changed = {
            attribute: value if isinstance(value, int) else list(value)
            for attribute, value in module.__dict__.items()
            if _is_size(value) and _is_size(old.__dict__.get(attribute)) and value != old.__dict__[attribute]
        }
        if changed:
            sizes.setdefault(name, {}).update(changed)
        for kind, own in (("parameter", module._parameters), ("buffer", module._buffers)):
            for leaf, tensor in own.items():
                former = getattr(old, leaf, None)
                transient = leaf in module._non_persistent_buffers_set
                if tensor is None or former is tensor:
                    continue
                same = former is not None and former.shape == tensor.shape
                if not same or (transient and not torch.equal(former, tensor)):
                    full = f"{name}.{leaf}" if name else leaf
                    tensors[full] = {"kind": TRANSIENT if transient else kind, "shape": list(tensor.shape)}
    weights = [weight.as_plain() for weight in find_weights(compressed)]
    return {"modules": modules, "sizes": sizes, "tensors": tensors, "weights": weights, "original": shapes}


def _is_size(value: Any) -> bool:
    """A plain integer, or a tuple or list of them: what modules keep their sizes in."""
    if type(value) in (tuple, list, torch.Size):
        return all(type(number) is int for number in value)
    return type(value) is int


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict without what modules add to it that is no tensor."""
    return {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def _check_original(model: nn.Module, shapes: dict[str, list[int]]) -> None:
    own = {name: list(tensor.shape) for name, tensor in _tensors(model).items()}
    for name in (*shapes, *own):
        if own.get(name) != shapes.get(name):
            raise ValueError(f"its {name} has shape {own.get(name)}, and {shapes.get(name)} in the compressed one")


def make_changes(model: nn.Module, changes: dict[str, Any], shapes: dict[str, list[int]]) -> list[Weight]:
    """Gives a model, in place, the structure that was described. Values of tensors are left to ``load_state_dict``.

    Args:
        changes: as ``describe_changes`` gave it.
        shapes: of the tensors that there are values for, by name. Nothing is allocated that is not among them, so that
            a file makes no more memory than it is long.

    Returns:
        The quantised weights, for :func:`put_weights`; until then their parameters are in floating point.

    Raises:
        ValueError: the changes do not fit the model or the shapes, or name what is not known here.
    """
    _check_original(model, changes["original"])
    tied = _tied(model)
    weights = [Weight.from_plain(values) for values in changes["weights"]]
    for weight in weights:
        _check_shapes(weight, shapes)
    packed = {place for weight in weights for place in weight.places}
    for name, spec in changes["modules"].items():
        old, kind = _submodule(model, name), spec.get("kind") if isinstance(spec, dict) else None
        if kind == "SlicedMultiheadAttention" and isinstance(old, nn.MultiheadAttention):
            old.__class__, old._qkv_same_embed_dim = SlicedMultiheadAttention, False
            continue
        if kind != "Identity":
            raise ValueError(f"a layer {name!r} of kind {spec!r} is none that compression makes")
        model.set_submodule(name, nn.Identity().train(old.training))
    for name, attributes in changes["sizes"].items():
        module = _submodule(model, name)
        for attribute, value in attributes.items():
            module.__dict__[attribute] = _same_kind(name, attribute, module.__dict__.get(attribute), value)
    for name, spec in changes["tensors"].items():
        _change_tensor(model, name, spec, None if name in packed else shapes.get(name))
    for first, *others in tied:
        for name in others:
            if _has_parameter(model, first) and _has_parameter(model, name):
                one, other = model.get_parameter(first), model.get_parameter(name)
                if one.shape == other.shape:
                    owner, _, leaf = name.rpartition(".")
                    setattr(model.get_submodule(owner), leaf, one)
    return weights


def _check_shapes(weight: Weight, shapes: dict[str, list[int]]) -> None:
    for part, (_, shape) in zip(PARTS, weight.options.packed_shapes(), strict=True):
        name = f"{weight.places[0]}.{part}"
        if list(shapes.get(name, ())) != list(shape):
            raise ValueError(f"{name} has shape {shapes.get(name)}, expected {list(shape)}")


def _same_kind(name: str, attribute: str, old: Any, value: Any) -> Any:
    """``value`` in the type of ``old``."""
    new = tuple(value) if isinstance(value, list) else value
    both = _is_size(old) and _is_size(new) and isinstance(old, int) == isinstance(new, int)
    if not both or attribute.startswith("__"):
        raise ValueError(f"an attribute {attribute!r} of {name!r} is no size of it, and no file may change it")
    return new if isinstance(new, int) else type(old)(new)


def _change_tensor(model: nn.Module, name: str, spec: dict[str, Any], shape: list[int] | None) -> None:
    """Makes room for a tensor of a new shape; where ``shape`` is None, a quantised weight will take its place."""
    owner, _, leaf = name.rpartition(".")
    module = _submodule(model, owner)
    old = getattr(module, leaf, None)
    if old is not None and not isinstance(old, Tensor):
        raise ValueError(f"{name} is a {type(old).__name__} in the model, expected a tensor")
    like = old if old is not None else next(module.parameters(), torch.empty(0))
    if shape is None:
        tensor = torch.empty(spec["shape"], dtype=like.dtype, device="meta")
    elif list(shape) != spec["shape"]:
        raise ValueError(f"{name} has shape {list(shape)} and is said to have {spec['shape']}")
    else:
        tensor = torch.zeros(spec["shape"], dtype=like.dtype, device=like.device)
    if spec["kind"] == "parameter":
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=like.requires_grad))
    else:
        module.register_buffer(leaf, tensor, persistent=spec["kind"] != TRANSIENT)


def transient_names(changes: dict[str, Any]) -> list[str]:
    """Of changed buffers, those that the state_dict has not."""
    return [name for name, spec in changes["tensors"].items() if spec.get("kind") == TRANSIENT]


def put_transients(model: nn.Module, changes: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Puts the values of such buffers in their places, and takes them out of ``tensors``."""
    for name in transient_names(changes):
        model.get_buffer(name).copy_(tensors.pop(name))


def put_weights(model: nn.Module, weights: list[Weight], tensors: dict[str, Tensor]) -> dict[str, QuantizedWeight]:
    """Puts the quantised weights in their places, and takes their parts out of ``tensors``; returns them by place.

    Raises:
        ValueError: a place is none of the model, or of another shape.
    """
    made = {}
    for weight in weights:
        parts = [tensors.pop(f"{weight.places[0]}.{part}") for part in PARTS]
        options = weight.options._replace(dtype=_parameter(model, weight.places[0]).dtype)
        check_parts(*parts, options)
        parameter = nn.Parameter(QuantizedWeight(*parts, options), requires_grad=False)
        for place in weight.places:
            shape = tuple(_parameter(model, place).shape)
            if shape != options.shape:
                raise ValueError(f"{place} has shape {list(shape)}, and {list(options.shape)} in the compressed one")
            owner, _, leaf = place.rpartition(".")
            setattr(model.get_submodule(owner), leaf, parameter)
            made[place] = parameter
    if weights:
        model.requires_grad_(False)
        forgo_fast_paths(model)
    return made


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"the model has no module {name!r}") from None


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    try:
        return model.get_parameter(name)
    except AttributeError:
        raise ValueError(f"the model has no parameter {name!r}") from None


def _has_parameter(model: nn.Module, name: str) -> bool:
    try:
        model.get_parameter(name)
    except AttributeError:
        return False
    return True


def _tied(model: nn.Module) -> list[list[str]]:
    return [names for names in all_names(model).values() if len(names) > 1]
