"""A small Llama over bytes, trained here on the standard library's text, densely and then with the gate.

It is the model of ``torch-sluice train`` (python/torch_sluice/train/), in three steps: some steps of dense training,
which give the model that peers run; then some more with gated sparse attention swapped in; then compression. So gate,
pruning and quantisation are seen together, and what the first of them alone gives.
"""

from torch import Tensor, nn

from benchmarks.models.cache import train_once
from benchmarks.models.task import Task, call_batches, make_batches, targets_of
from torch_sluice.swap import swap_attention
from torch_sluice.train.data import Corpus, load_corpus
from torch_sluice.train.model import build_model
from torch_sluice.train.settings import PRESETS, Settings
from torch_sluice.train.side import Side
from torch_sluice.train.sluice import SluiceSide

SETTINGS = PRESETS["demo"].override(steps=120, context=1024, micro_batches=1, micro_size=2, warmup=12)
GATED_STEPS = 60
QUICK = PRESETS["demo"].override(
    steps=30,
    context=64,
    micro_batches=1,
    layers=1,
    width=32,
    heads=2,
    feedforward=64,
    local_window=8,
    target_density=0.5,
)


class NextByte(nn.Module):
    """The logits [B, N, 256] of the next byte after each of tokens int64 [B, N]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


class _GatedFromDense(SluiceSide):
    """Goes on from a dense model's weights with gated attention."""

    def __init__(self, settings: Settings, weights: dict[str, Tensor]):
        self._weights = weights
        super().__init__(settings)

    def prepare(self) -> None:
        self.model.load_state_dict(self._weights)
        super().prepare()


def train_dense(settings: Settings, corpus: Corpus) -> dict[str, Tensor]:
    side = Side(settings)
    for step in range(settings.steps):
        side.train_step(_batches(settings, corpus, step), step)
    return side.model.state_dict()


def train_gated(settings: Settings, corpus: Corpus, dense: dict[str, Tensor]) -> dict[str, Tensor]:
    side = _GatedFromDense(settings, dense)
    try:
        for step in range(settings.steps):
            side.train_step(_batches(settings, corpus, 100_000 + step), step)
        return side.model.state_dict()
    finally:
        side.close()


def _batches(settings: Settings, corpus: Corpus, step: int) -> list[Tensor]:
    return [
        corpus.batch(settings.seed, step, micro, settings.micro_size, settings.context)
        for micro in range(settings.micro_batches)
    ]


def next_byte_accuracy(model, batches) -> float:
    """The share of bytes whose highest logit is the byte that follows."""
    return (call_batches(model, batches).argmax(-1) == targets_of(batches)).float().mean().item()


class NextByteLoss:
    """Cross entropy on training text that the number of the step decides."""

    def __init__(self, settings: Settings, corpus: Corpus):
        self.settings, self.corpus = settings, corpus

    def __call__(self, model: nn.Module, step: int) -> Tensor:
        (window,) = _batches(self.settings.override(micro_batches=1), self.corpus, 200_000 + step)
        return nn.functional.cross_entropy(model(window[:, :-1]).flatten(0, 1), window[:, 1:].flatten())


def load(quick: bool = False) -> Task:
    """The task; trains the model the first time (cached files after that). ``quick``: a toy of one layer."""
    settings = QUICK if quick else SETTINGS
    gated_settings = settings if quick else settings.override(steps=GATED_STEPS, learning_rate=1e-3, warmup=5)
    corpus = load_corpus(None, settings.context)
    recipe = f"text 1: {settings} {corpus.fingerprint}"
    dense_weights = train_once("text-dense", recipe, lambda: train_dense(settings, corpus))
    gated_weights = train_once(
        "text-gated", f"{recipe} {gated_settings}", lambda: train_gated(gated_settings, corpus, dense_weights)
    )
    dense = build_model(settings).eval()
    dense.load_state_dict(dense_weights)
    model = build_model(settings).eval()
    swap_attention(model, target_density=settings.target_density, window=settings.local_window, sinks=settings.sinks)
    model.load_state_dict(gated_weights)
    windows = corpus.heldout_windows(24 if quick else 72, settings.context)
    inputs, targets = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    # The windows lie in the order of the held-out text: its first third is to select by, the rest to judge by.
    third = len(windows) // 3
    heldout = inputs[third:]
    return Task(
        name="text",
        title=f"Llama of {settings.layers} layers over {settings.context} bytes, gated sparse attention",
        metric_name="next-byte accuracy",
        model=NextByte(model),
        dense=NextByte(dense),
        selection=make_batches(inputs[:third], targets[:third], 8),
        heldout=make_batches(heldout, targets[third:], 8),
        metric=next_byte_accuracy,
        draw_inputs=lambda batch: heldout[:batch].clone(),
        train_step=NextByteLoss(settings, corpus),
        train_steps=4 if quick else 45,
        learning_rate=5e-4,
        notes=[
            f"text: trained here for {settings.steps} dense and {gated_settings.steps} gated steps; peers run it dense"
        ],
    )
