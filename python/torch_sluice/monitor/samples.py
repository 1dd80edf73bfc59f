"""What a monitor takes from the model by itself, on some steps: kept pairs, chosen bits, 16-bit sums of gradients."""

import dataclasses
import threading
import weakref

import torch
from torch import nn

from torch_sluice.accumulate.session import open_sessions
from torch_sluice.attention import Gate
from torch_sluice.attention import forward as attention
from torch_sluice.attention.density import possible_pairs, sample_gate
from torch_sluice.monitor import bits
from torch_sluice.monitor.records import Budget

_SHARE = 0.001  # of the time of the steps that looking may take
_lock = threading.Lock()
_listening: "weakref.WeakSet[ModelSampler]" = weakref.WeakSet()
_MOST_CALLS = 256  # of attention, or of quantised operators, that are kept of one step


class ModelSampler:
    """Looks at a model during a step, now and then: so seldom that it takes a thousandth of the time at most."""

    def __init__(self, model: nn.Module):
        self._model = model
        self._modules: set[int] = set()
        self._budget = Budget(_SHARE)
        self._listening = False
        self._calls: list = []
        self._widths: list[torch.Tensor] = []
        self.bits: dict[int, int] = {}  # width -> rows, over all steps that were looked at

    def start_step(self) -> None:
        if not self._listening and self._budget.open:
            with self._budget.spend():
                # Some may have been swapped in since the last look.
                self._modules = {*map(id, self._model.modules()), *map(id, self._model.parameters())}
            self._calls, self._widths, self._listening = [], [], True
            with _lock:
                _listening.add(self)
                if _tell_attention not in attention.listeners:
                    attention.listeners.append(_tell_attention)
                    bits.listeners.append(_tell_bits)

    def end_step(self, seconds: float, density_wanted: bool) -> dict[str, float]:
        """The figures of the step that ends; none where it was not looked at."""
        self._budget.earn(seconds)
        if not self._listening:
            return {}
        self.stop()
        calls, self._calls = self._calls, []  # another thread may still be adding to them
        widths, self._widths = self._widths, []
        figures: dict[str, float] = {}
        with self._budget.spend(), torch.no_grad():
            if density_wanted and calls:
                figures["density"] = _density_of(calls)
            if widths:
                figures.update(self._count_widths(widths))
            for session in list(open_sessions):
                if session.model is self._model or getattr(session.model, "module", None) is self._model:
                    figures["half_share"] = session.fp16_share
        return figures

    def stop(self) -> None:
        """Listens no longer."""
        if self._listening:
            self._listening = False
            with _lock:
                _listening.discard(self)
            _fall_silent()

    def hear_attention(self, gate: Gate, record) -> None:
        if id(gate) in self._modules and len(self._calls) < _MOST_CALLS:
            self._calls.append(dataclasses.replace(record, a=record.a.detach(), b=record.b.detach()))

    def hear_bits(self, widths: torch.Tensor, source: nn.Module | torch.Tensor | None) -> None:
        if (source is None or id(source) in self._modules) and len(self._widths) < _MOST_CALLS:
            self._widths.append(widths.detach())

    def _count_widths(self, heard: list[torch.Tensor]) -> dict[str, float]:
        counts = torch.cat([widths.reshape(-1).cpu().long() for widths in heard]).bincount().tolist()
        found = {width: count for width, count in enumerate(counts) if count}
        for width, count in found.items():
            self.bits[width] = self.bits.get(width, 0) + count
        total = sum(found.values())
        return {f"bits_{width}_share": count / total for width, count in found.items()}


def _tell_attention(gate: Gate, record) -> None:
    for sampler in list(_listening):
        sampler.hear_attention(gate, record)
    _fall_silent()


def _tell_bits(widths: torch.Tensor, source: nn.Module | torch.Tensor | None) -> None:
    for sampler in list(_listening):
        sampler.hear_bits(widths, source)
    _fall_silent()


def _fall_silent() -> None:
    """Without a sampler, be it one that was dropped and never stopped, nobody needs to be told."""
    with _lock:
        if not _listening and _tell_attention in attention.listeners:
            attention.listeners.remove(_tell_attention)
            bits.listeners.remove(_tell_bits)


def _density_of(calls) -> float:
    """Kept pairs / pairs that the causal masks and key ranges allow, over all calls: by the kernel's count, or, under
    noise and with masks, whose pairs would have to be counted one by one, by a sample of the rows."""
    kept = possible = 0.0
    # Random rows, but not at the cost of the model's random numbers: those must come as without a monitor.
    with torch.random.fork_rng(devices=[]):
        for call in calls:
            if call.kept is not None and call.near["attn_mask"] is None:
                kept += float(call.kept.sum())
                possible += float(possible_pairs(call.a, call.b.shape[2], **call.near))
                continue
            near = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in call.near.items()}
            _, call_kept, _, call_possible = sample_gate(call.a.cpu(), call.b.cpu(), tau=call.tau, **near)
            kept += float(call_kept)
            possible += float(call_possible)
    return kept / possible if possible else 1.0
