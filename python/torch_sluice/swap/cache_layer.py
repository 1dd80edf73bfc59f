"""What lies beside the tensors of a cache's layer, and goes along with them: b of past keys, and how much padding there
was. A layer of transformers holds keys and values; what is done to their batch and their length is done to ours.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def _reorder_cache(super_method, layer, beam_idx: Tensor) -> None:
    super_method(layer, beam_idx)
    _change(layer, lambda x: x.index_select(0, beam_idx.to(x.device)))


def _batch_repeat_interleave(super_method, layer, repeats: int) -> None:
    super_method(layer, repeats)
    _change(layer, lambda x: x.repeat_interleave(repeats, dim=0))


def _batch_select_indices(super_method, layer, indices: Tensor) -> None:
    super_method(layer, indices)
    _change(layer, lambda x: x[indices])


def _crop(super_method, layer, tokens_to_remove: int) -> None:
    super_method(layer, tokens_to_remove)
    b = b_beside(layer)
    if b is not None and tokens_to_remove:
        layer.sluice_b = b[..., : -abs(tokens_to_remove)]


def _reset(super_method, layer) -> None:
    super_method(layer)
    layer.sluice_b = layer.sluice_padding = None


_METHODS = {
    "reorder_cache": _reorder_cache,
    "batch_repeat_interleave": _batch_repeat_interleave,
    "batch_select_indices": _batch_select_indices,
    "crop": _crop,
    "reset": _reset,
}


def _change(layer, change: Callable[[Tensor], Tensor]) -> None:
    """Applies change to what lies beside: tensors whose first dimension is the batch."""
    for name in ("sluice_b", "sluice_padding"):
        value = getattr(layer, name, None)
        if value is not None:
            setattr(layer, name, change(value))


@functools.cache
def _following_class(cls: type) -> type:
    """A subclass of a layer's class, of its name, whose methods change what lies beside, too."""

    def extend(name: str) -> Callable[..., None]:
        @functools.wraps(getattr(cls, name))
        def method(self, *args, **kwargs):
            _METHODS[name](getattr(cls, name), self, *args, **kwargs)

        return method

    methods: dict[str, Any] = {name: extend(name) for name in _METHODS if hasattr(cls, name)}
    methods["sluice_class"] = cls
    methods["__reduce_ex__"] = lambda self, protocol: (_make, (cls,), self.__dict__)
    methods["_layer_type"] = None  # else transformers would make it the class of all layers of that type
    return type(cls.__name__, (cls,), {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **methods})


def _make(cls: type):
    """A layer without attributes, for copy and pickle."""
    return object.__new__(_following_class(cls))


def follow(layer) -> None:
    """From now on what lies beside the layer goes along with it. A compiler can't change a class: there it stays put,
    which is right for beams of one prompt."""
    if not torch.compiler.is_compiling() and not hasattr(type(layer), "sluice_class"):
        layer.__class__ = _following_class(type(layer))


def b_beside(layer) -> Tensor | None:
    """[B, H, N] of past keys; None if nothing lies there."""
    return getattr(layer, "sluice_b", None)


def put_beside(layer, b: Tensor) -> None:
    follow(layer)
    layer.sluice_b = b


def append_beside(layer, b: Tensor) -> Tensor:
    """Puts b [B, H, n] behind that of past keys; returns that of all."""
    past = b_beside(layer)
    put_beside(layer, b if past is None else torch.cat((past, b), dim=-1))
    return layer.sluice_b


def keeps_values_as_they_are(layer) -> bool:
    """Whether channels that are put beside values come back bit by bit: those that quantise them round."""
    return not any("Quantized" in cls.__name__ for cls in type(layer).__mro__)
