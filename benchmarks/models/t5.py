"""A T5 of 2 + 2 layers over bytes, trained here to restore text of which one byte in four is covered.

Its encoder reads the covered text, its decoder writes the whole; the metric counts what it writes where it sees the
right bytes before. Text is the standard library's (benchmarks/models/text.py).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.task import MissingPackageError, Task, make_batches
from benchmarks.models.text import next_byte_accuracy
from benchmarks.models.training import trained
from torch_sluice.train.data import load_corpus

SIZES = {"d_model": 160, "d_kv": 32, "num_heads": 5, "d_ff": 480, "num_layers": 2}
QUICK = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "num_layers": 1}
LENGTH = 96
COVERED, START, SYMBOLS = 1, 2, 256  # control bytes that the text doesn't have
SHARE = 0.25
TRAINED = 16  # texts of a step
BATCH = 8


class Restorer(nn.Module):
    """The logits [B, N, 256] of each byte, from the covered text and the bytes before it, both int64 [B, N]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, covered: Tensor, before: Tensor) -> Tensor:
        return self.model(input_ids=covered, decoder_input_ids=before, use_cache=False).logits


def build(sizes: dict) -> nn.Module:
    try:
        from transformers import T5Config, T5ForConditionalGeneration
    except ImportError as error:
        raise MissingPackageError("t5 needs transformers: pip install 'torch-sluice[models]'") from error
    config = T5Config(
        vocab_size=SYMBOLS, **sizes, dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=0,
        decoder_start_token_id=START, use_cache=False,
    )  # fmt: skip
    return Restorer(T5ForConditionalGeneration(config))


def cover(texts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """What encoder and decoder read of texts int64 [B, N]: with covered bytes, and moved on by one."""
    gone = torch.rand(texts.shape, generator=generator) < SHARE
    return texts.masked_fill(gone, COVERED), F.pad(texts[:, :-1], (1, 0), value=START)


def load(quick: bool = False) -> Task:
    """The task; trains the model the first time (a cached file after that). ``quick``: a toy of 1 + 1 layers."""
    sizes, length, steps = (QUICK, 32, 30) if quick else (SIZES, LENGTH, 400)
    corpus = load_corpus(None, length)

    def loss(model, step):
        texts = corpus.batch(2, step, 0, TRAINED, length)[:, :-1]
        read = cover(texts, torch.Generator().manual_seed(step))
        return F.cross_entropy(model(*read).flatten(0, 1), texts.flatten())

    model = trained("t5", f"{sizes} {length} {SHARE} {corpus.fingerprint}", lambda: build(sizes), loss, steps)
    texts = corpus.heldout_windows(48 if quick else 384, length)[:, :-1].contiguous()
    read = cover(texts, torch.Generator().manual_seed(0))
    third = len(texts) // 3  # in the order of the text: the first to select by, the rest to judge by
    heldout = tuple(tensor[third:] for tensor in read)
    return Task(
        name="t5",
        title=f"T5 of {sizes['num_layers']} + {sizes['num_layers']} layers over {length} bytes, trained here to "
        "restore the standard library's text",
        metric_name="byte accuracy",
        model=model,
        selection=make_batches(tuple(tensor[:third] for tensor in read), texts[:third], BATCH),
        heldout=make_batches(heldout, texts[third:], BATCH),
        metric=next_byte_accuracy,
        draw_inputs=lambda batch: tuple(tensor[:batch].clone() for tensor in heldout),
        train_step=lambda model, step: loss(model, 100_000 + step),
        train_steps=4 if quick else 80,
        learning_rate=5e-4,
        notes=[f"t5: trained here for {steps} steps of {TRAINED} texts, of which a quarter of the bytes is covered"],
    )
