"""Runs a model and follows which channel of which parameter each element comes from, operator by operator.

Nothing is known here of modules: what is followed is what the operators of ATen do to the elements (rules.py), so that
a channel shuffle, a fused projection in any order of heads, or the gates of an LSTM need no rule of their own.

The same run can act as if channels had left (``couplings.gone``, absent.py): their elements are 0 in every product and
sum, and what takes a mean, a maximum or a softmax over channels takes it over the others. That is what a model has to
give once these channels are cut from its parameters, and how verify.py knows that they were cut rightly. Many such runs
are done on the same inputs, and what the first notes of an operator answers for the others (recording.py).
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from torch_sluice.compress.absent import run_without
from torch_sluice.compress.calling import call_model, evaluating, float_outputs
from torch_sluice.compress.couplings import Couplings
from torch_sluice.compress.labels import Axes, all_numbers, clean, gone_mask
from torch_sluice.compress.meetings import Meetings
from torch_sluice.compress.recording import (
    KeptAxes,
    Recording,
    axes_of_parameters,
    describe_operator,
    leaves_of,
    recording_for,
)
from torch_sluice.compress.rules import rule_for


class ChannelTracer(TorchDispatchMode):
    """The axes (labels.py) of every tensor that lives while a model runs."""

    def __init__(self, couplings: Couplings, recording: Recording | None = None):
        super().__init__()
        self.couplings = couplings
        self.unknown: set[str] = set()  # operators that no rule follows
        self._recording = recording
        self._noted: list[tuple[Tensor, Axes, bool]] = []  # of the operator that runs, for the recording
        self._masks: dict[int, Tensor | None] = {}  # of what is gone, by the id of kept axes
        self._axes = WeakIdKeyDictionary()
        self._of_memory: dict[tuple, Axes] = {}
        self._parameter_memory = {t.untyped_storage().data_ptr() for t in couplings.tensors.values() if _is_plain(t)}
        by_name = axes_of_parameters(couplings) if recording is None else recording.parameters
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
        if self._recording is not None:
            axes = self._recording.keep(axes)
            self._noted.append((out, axes, fresh))
        self._set(out, axes, fresh)

    def _set(self, out: Tensor, axes: Axes, fresh: bool) -> None:
        if axes:
            self._axes[out] = axes
        elif out in self._axes:
            del self._axes[out]
        if fresh and axes and self.couplings.gone is not None and not out.is_inference():
            mask = self._gone_mask(axes)
            if mask is not None:
                out.masked_fill_(mask, 0)

    def _gone_mask(self, axes: Axes) -> Tensor | None:
        """Broadcastable: True for the elements that are gone; None: all stay."""
        if type(axes) is not KeptAxes:
            return gone_mask(self.couplings, axes)
        if id(axes) not in self._masks:
            self._masks[id(axes)] = gone_mask(self.couplings, axes)
        return self._masks[id(axes)]

    def without_gone(self, tensor: Any) -> Any:
        """The tensor, or a copy in which the elements that are gone are 0."""
        if not isinstance(tensor, Tensor):
            return tensor
        mask = self._gone_mask(self.axes(tensor))
        return tensor if mask is None else tensor.masked_fill(mask, 0)

    def run(self, func, args, kwargs) -> Any:
        """What an operator gives; where channels are gone, as if they had left."""
        if self.couplings.gone is None:
            return func(*args, **kwargs)
        return run_without(self, func, args, kwargs)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.couplings.meetings is not None:
            self.couplings.meetings.begin()
        if self._recording is None:
            key, carries = None, any(self.axes(leaf) for leaf in tree_leaves((args, kwargs)))
        else:
            key, carries = describe_operator(self, func, args, kwargs)
        if not carries:
            out = func(*args, **kwargs)
            if func._schema.is_mutable:
                self._forget(args)
            return out
        if self._recording is None:
            return rule_for(func)(self, func, args, kwargs)
        return self._run_recorded(key, func, args, kwargs)

    def _run_recorded(self, key, func, args, kwargs):
        known = self._recording.find(key)
        if known is None:
            self._noted.clear()
            out = rule_for(func)(self, func, args, kwargs)
            self._recording.add(key, out, self._noted)
            return out
        out = self.run(func, args, kwargs)
        leaves = leaves_of(out) if known else []
        for place, axes, fresh in known:
            self._set(leaves[place], axes, fresh)
        return out

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
    the operators that could not be followed.

    Args:
        gone: indices of (name, dim) that the run is to act as if they had left. Only the outputs are then meant for
            the caller: operators that are known from a run before are not followed again.
        meetings: is told what becomes equal.
    """
    recording = recording_for(model, inputs, new=gone is None) if meetings is None else None
    couplings = Couplings(model, meetings) if recording is None else recording.couplings
    if gone is not None:
        recording.begin(gone)
    tracer = ChannelTracer(couplings, recording)
    with evaluating(model), torch.no_grad(), plain_operators(model):
        with tracer:
            output = call_model(model, inputs)
    outputs = float_outputs(output)
    for out in outputs if gone is None else ():
        couplings.freeze(all_numbers(tracer.axes(out)), "its channels are the model's output")
    return couplings, outputs, tracer.unknown
