"""Gates for a language model that was never trained with any, and the gated model by transformers alone, to compare."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from torch_sluice.attention import Gate, kept_pairs
from torch_sluice.attention.forward import listeners
from torch_sluice.selection import select_logit_tau
from torch_sluice.swap.dense import dense_gated_attention

WINDOW, SINKS = 32, 4
_NAME = "swap_language_reference"
_SPREAD = 2.0  # standard deviation of a and b
_ROWS = 256  # queries at a time, which bounds the memory of the dense formula


def gates_of(model: nn.Module) -> dict[str, Gate]:
    """{name of a layer: its gate}"""
    return {name.rpartition(".")[0]: module for name, module in model.named_modules() if isinstance(module, Gate)}


@torch.no_grad()
def close_gates(model: nn.Module, tokens: Tensor, density: float) -> float:
    """Draws all gates of a swapped causal model so that each keeps ``density`` of the far pairs of tokens [B, N].

    Returns the share of all pairs that they keep, those of window and sinks included.
    """
    generator = torch.Generator().manual_seed(0)

    def settle(gate: Gate, _, out: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        a, b = out
        for weight, logits in ((gate.query_weight, a), (gate.key_weight, b)):
            scale = _SPREAD / logits.std().clamp(min=1e-6)
            weight.mul_(scale)
            logits.mul_(scale)
        # A gate keeps what it gives 1/2 or more: the logit 0.
        bound = select_logit_tau(a, b, density, causal=True, window=WINDOW, sinks=SINKS).mean(0)
        gate.query_bias.sub_(bound)
        return a - bound[:, None], b

    hooks = []
    for gate in gates_of(model).values():
        for name, parameter in gate.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(drawn if name.endswith("weight") else torch.zeros_like(drawn))
        hooks.append(gate.register_forward_hook(settle))
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    counts = torch.zeros(2, dtype=torch.long)

    def count(gate: Gate, record) -> None:
        kept, possible = kept_pairs(record.a, record.b, tau=record.tau, **record.near)
        possible = possible if possible.dim() == 2 else possible.unsqueeze(1).expand_as(kept)
        counts.add_(torch.stack((kept.sum(), possible.sum())))

    listeners.append(count)
    try:
        model(tokens)
    finally:
        listeners.remove(count)
    return float(counts[0] / counts[1])


def compute_backwards(model: nn.Module) -> nn.Module:
    """Lets a model's SDPA sum up the channels from the last on: the same in another order of additions."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(layer, q, k, *arguments, **options):
        return sdpa_attention_forward(layer, q.flip(-1), k.flip(-1), *arguments, **options)

    _register(f"{_NAME}_sdpa", attend)
    model.set_attn_implementation(f"{_NAME}_sdpa")
    return model


def _register(name: str, attend: Callable) -> None:
    """An attention function, for masks as SDPA has them."""
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


class ByTransformers:
    """A gated model without a swap: hooks compute a and b, those of past tokens lie in a list, and the attention
    function is the dense formula. Keys and values go through the cache that it is given, of whatever class.

    Args:
        model: not swapped; it is changed. Its cache must grow by what it is given, as dynamic and quantised ones do.
        gates: {name of a layer: its gate}
        backwards: scores sum up the channels from the last on: the same in another order of additions.
    """

    def __init__(self, model: nn.Module, gates: dict[str, Gate], backwards: bool = False):
        name = f"{_NAME}_{int(backwards)}"
        _register(name, self._attend)
        model.set_attn_implementation(name)
        self.model, self._tau, self._backwards = model, {}, backwards
        self._logits: dict[nn.Module, tuple[Tensor, Tensor]] = {}
        for name, gate in gates.items():
            layer = model.get_submodule(name)
            self._tau[layer] = gate.tau
            layer.register_forward_pre_hook(partial(self._note, gate), with_kwargs=True)

    def forget(self) -> None:
        """Before another text."""
        self._logits.clear()

    def _note(self, gate: Gate, layer: nn.Module, args, kwargs) -> None:
        a, b = gate(args[0] if args else kwargs["hidden_states"])
        if layer in self._logits:
            b = torch.cat((self._logits[layer][1], b), dim=-1)
        self._logits[layer] = a, b

    def _attend(self, layer, q, k, v, attention_mask, scaling=None, **_):
        a, b = self._logits[layer]
        if self._backwards:
            q, k = q.flip(-1), k.flip(-1)
        n_q, n_k = q.shape[2], k.shape[2]
        given = dict(causal=attention_mask is None, keep_self=True, tau=self._tau[layer], window=WINDOW, sinks=SINKS)
        begin = torch.zeros(q.shape[0], dtype=torch.long)
        if attention_mask is not None:
            begin = attention_mask[:, 0, -1].to(torch.uint8).argmax(-1).expand(q.shape[0])
        outs = []
        for first in range(0, n_q, _ROWS):
            rows = slice(first, first + _ROWS)
            mask = attention_mask if attention_mask is None or n_q == 1 else attention_mask[:, :, rows]
            place = torch.full_like(begin, n_k - n_q + first)
            outs.append(
                dense_gated_attention(
                    q[:, :, rows], k, v, a[:, :, rows], b, mask=mask, scale=scaling, q_offset=place, text_begin=begin,
                    **given,
                )[0]
            )  # fmt: skip
        return torch.cat(outs, dim=2).transpose(1, 2).contiguous(), None
