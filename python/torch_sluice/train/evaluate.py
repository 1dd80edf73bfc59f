"""Held-out text: loss, next-byte accuracy and, where attention is gated, the share of pairs that were kept."""

import contextlib

import torch
from torch.nn import functional

from torch_sluice.monitor import KeptPairCounter
from torch_sluice.train.model import predict


@torch.no_grad()
def evaluate(model: torch.nn.Module, windows: torch.Tensor, count_pairs: bool = False) -> dict[str, float]:
    """Reads int64 windows [W, context + 1] in evaluation mode, one by one.

    Returns:
        ``loss`` in nats a byte, ``accuracy`` of the likeliest next byte, and with ``count_pairs`` the ``density``.
    """
    training = model.training
    model.eval()
    loss = correct = 0.0
    counter = KeptPairCounter() if count_pairs else contextlib.nullcontext()
    try:
        with counter:
            for window in windows:
                logits = predict(model, window[None, :-1])[0]
                loss += functional.cross_entropy(logits, window[1:], reduction="sum").item()
                correct += (logits.argmax(-1) == window[1:]).sum().item()
    finally:
        model.train(training)
    count = windows.shape[0] * (windows.shape[1] - 1)
    result = {"loss": loss / count, "accuracy": correct / count}
    if count_pairs:
        result["density"] = counter.density
    return result
