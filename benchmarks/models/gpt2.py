"""A GPT-2 of 4 layers over bytes, trained here on the standard library's text: ``Conv1D``, fused q, k and v, tied head.

Text is that of the Llama one (benchmarks/models/text.py): what is held out is files that training has not seen.
"""

import torch.nn.functional as F
from torch import nn

from benchmarks.models.task import MissingPackageError, Task, make_batches
from benchmarks.models.text import NextByte, next_byte_accuracy
from benchmarks.models.training import trained
from torch_sluice.train.data import load_corpus

SIZES = {"n_embd": 192, "n_layer": 4, "n_head": 6}
QUICK = {"n_embd": 32, "n_layer": 1, "n_head": 2}
CONTEXT = 128
TRAINED = 16  # windows of a step
BATCH = 8


def build(sizes: dict, context: int) -> nn.Module:
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError as error:
        raise MissingPackageError("gpt2 needs transformers: pip install 'torch-sluice[models]'") from error
    config = GPT2Config(
        vocab_size=256, n_positions=context, **sizes, embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0, use_cache=False,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return NextByte(GPT2LMHeadModel(config))


def load(quick: bool = False) -> Task:
    """The task; trains the model the first time (a cached file after that). ``quick``: a toy of one layer."""
    sizes, context, steps = (QUICK, 32, 30) if quick else (SIZES, CONTEXT, 300)
    corpus = load_corpus(None, context)

    def loss(model, step):
        window = corpus.batch(1, step, 0, TRAINED, context)
        return F.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())

    model = trained("gpt2", f"{sizes} {context} {corpus.fingerprint}", lambda: build(sizes, context), loss, steps)
    windows = corpus.heldout_windows(48 if quick else 384, context)
    inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    third = len(windows) // 3  # in the order of the text: the first to select by, the rest to judge by
    heldout = inputs[third:]
    return Task(
        name="gpt2",
        title=f"GPT-2 of {sizes['n_layer']} layers over {context} bytes, trained here on the standard library",
        metric_name="next-byte accuracy",
        model=model,
        selection=make_batches(inputs[:third], targets[:third], BATCH),
        heldout=make_batches(heldout, targets[third:], BATCH),
        metric=next_byte_accuracy,
        draw_inputs=lambda batch: heldout[:batch].clone(),
        train_step=lambda model, step: loss(model, 100_000 + step),
        train_steps=4 if quick else 60,
        learning_rate=5e-4,
        notes=[f"gpt2: trained here for {steps} steps of {TRAINED} windows"],
    )
