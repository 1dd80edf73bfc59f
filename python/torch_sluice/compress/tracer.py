"""Runs a model and follows which channel of which parameter each element comes from, operator by operator.

Nothing is known here of modules: what is followed is what the operators of ATen do to the elements (rules.py), so that
a channel shuffle, a fused projection in any order of heads, or the gates of an LSTM need no rule of their own.

The same run can act as if channels had left (``couplings.gone``): their elements are 0 in every product and sum, and
what takes a mean, a maximum or a softmax over channels takes it over the others. That is what a model has to give once
these channels are cut from its parameters, and how verify.py knows that they were cut rightly.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from torch_sluice.compress.calling import call_model, evaluating, float_outputs
from torch_sluice.compress.couplings import Couplings
from torch_sluice.compress.labels import Axes, all_numbers, clean, kept_mask
from torch_sluice.compress.meetings import Meetings
from torch_sluice.compress.rules import rule_for
from torch_sluice.compress.slicing import VALUES


class ChannelTracer(TorchDispatchMode):
    """The axes (labels.py) of every tensor that lives while a model runs."""

    def __init__(self, couplings: Couplings):
        super().__init__()
        self.couplings = couplings
        self.unknown: set[str] = set()  # operators that no rule follows
        self._axes = WeakIdKeyDictionary()
        self._of_memory: dict[tuple, Axes] = {}
        self._parameter_memory = {t.untyped_storage().data_ptr() for t in couplings.tensors.values() if _is_plain(t)}
        by_name: dict[str, Axes] = {name: [] for name in couplings.tensors}
        for source in couplings.sources:
            if source.dim == VALUES:
                continue
            shape = [source.size if dim == source.dim else 1 for dim in range(couplings.tensors[source.name].dim())]
            by_name[source.name].append(torch.arange(source.first, source.first + source.size).reshape(shape))
        for name, axes in by_name.items():
            tensor = couplings.tensors[name]
            self._axes[tensor] = axes
            if _is_plain(tensor) and tensor.numel():
                self._of_memory[_place(tensor)] = axes

    def axes(self, tensor: Any) -> Axes:
        if not isinstance(tensor, Tensor):
            return []
        known = self._axes.get(tensor)
        if known is None and self._of_memory:  # parameter.data is another tensor on the same memory
            known = self._of_memory.get(_place(tensor)) if type(tensor) is Tensor and tensor.numel() else None
        return known or []

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, a buffer, or a view of one."""
        return _is_plain(tensor) and tensor.untyped_storage().data_ptr() in self._parameter_memory

    def finish(self, out: Any, axes: Axes, fresh: bool = True) -> None:
        """Notes the axes of a result. ``fresh``: its memory is its own, so that what is gone may be zeroed in it."""
        if not isinstance(out, Tensor):
            return
        axes = clean(self.couplings, axes)
        if axes:
            self._axes[out] = axes
        elif out in self._axes:
            del self._axes[out]
        if fresh and axes and self.couplings.gone is not None and not out.is_inference():
            mask = kept_mask(self.couplings, axes)
            if mask is not None:
                out.masked_fill_(~mask, 0)

    def without_gone(self, tensor: Any) -> Any:
        """The tensor, or a copy in which the elements that are gone are 0."""
        if self.couplings.gone is None or not isinstance(tensor, Tensor):
            return tensor
        mask = kept_mask(self.couplings, self.axes(tensor))
        return tensor if mask is None else tensor.masked_fill(~mask, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.couplings.meetings is not None:
            self.couplings.meetings.begin()
        if not any(self.axes(leaf) for leaf in tree_leaves((args, kwargs))):
            out = func(*args, **kwargs)
            if func._schema.is_mutable:
                self._forget(args)
            return out
        return rule_for(func)(self, func, args, kwargs)

    def _forget(self, args) -> None:
        """What was written over by something without channels carries none."""
        if args and isinstance(args[0], Tensor) and args[0] in self._axes:
            del self._axes[args[0]]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter, nn.Buffer)


def _place(tensor: Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


@contextlib.contextmanager
def plain_operators(model: nn.Module):
    """Attention and recurrent layers as operators of ATen that hide nothing."""
    fast, mkldnn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    hooks = []

    def enable(enabled: bool):
        return lambda *_: torch._C._set_mkldnn_enabled(enabled)

    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for module in model.modules():
            if isinstance(module, nn.RNNBase):  # oneDNN runs a whole layer as one operator
                hooks.append(module.register_forward_pre_hook(enable(False)))
                hooks.append(module.register_forward_hook(enable(mkldnn), always_call=True))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        torch._C._set_mkldnn_enabled(mkldnn)
        torch.backends.mha.set_fastpath_enabled(fast)


def trace(
    model: nn.Module,
    inputs: Any,
    gone: dict[tuple[str, int], set[int]] | None = None,
    meetings: Meetings | None = None,
) -> tuple[Couplings, list[Tensor], set[str]]:
    """The couplings of a model's channels on the path that it takes for these inputs, its floating-point outputs, and
    the operators that could not be followed."""
    couplings = Couplings(model, gone, meetings)
    tracer = ChannelTracer(couplings)
    with evaluating(model), torch.no_grad(), plain_operators(model):
        with tracer:
            output = call_model(model, inputs)
    outputs = float_outputs(output)
    for out in outputs:
        couplings.freeze(all_numbers(tracer.axes(out)), "its channels are the model's output")
    return couplings, outputs, tracer.unknown
