"""A vision transformer of 4 layers, trained here on scikit-learn's digits: 8 x 8 pixels in patches of 2 x 2."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.digits import accuracy, load_scans
from benchmarks.models.task import MissingPackageError, Task, make_batches
from benchmarks.models.training import trained

SIZES = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 256}
QUICK = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
SIDE, PATCH = 8, 2  # pixels
NOISE = 0.1  # standard deviation of what is added in training; a scan's darkest pixel is 1
TRAINED = 64  # scans of a step
BATCH = 8


class Classifier(nn.Module):
    """Logits [B, 10] of pictures [B, 1, 8, 8]."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pictures: Tensor) -> Tensor:
        return self.model(pixel_values=pictures).logits


def build(sizes: dict) -> nn.Module:
    try:
        from transformers import ViTConfig, ViTForImageClassification
    except ImportError as error:
        raise MissingPackageError("vit needs transformers: pip install 'torch-sluice[models]'") from error
    config = ViTConfig(
        image_size=SIDE, patch_size=PATCH, num_channels=1, num_labels=10, **sizes,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return Classifier(ViTForImageClassification(config))


def load(quick: bool = False) -> Task:
    """The task; trains the model the first time (a cached file after that). ``quick``: a toy of one layer."""
    sizes, steps = (QUICK, 30) if quick else (SIZES, 600)
    scans = load_scans()
    drawn, classes = scans["train"]

    def loss(model, step):
        generator = torch.Generator().manual_seed(1000 + step)
        chosen = torch.randint(len(drawn), (TRAINED,), generator=generator)
        return F.cross_entropy(
            model(drawn[chosen] + NOISE * torch.randn(TRAINED, 1, SIDE, SIDE, generator=generator)), classes[chosen]
        )

    model = trained("vit", f"{sizes} {TRAINED} {NOISE} {SIDE} {PATCH}", lambda: build(sizes), loss, steps)
    parts = {
        part: make_batches(*(tensor[: 64 if quick else None] for tensor in scans[part]), BATCH)
        for part in ("selection", "heldout")
    }
    heldout = torch.cat([inputs for inputs, _ in parts["heldout"]])
    return Task(
        name="vit",
        title=f"vision transformer of {sizes['num_hidden_layers']} layers, trained here on scikit-learn's digits",
        metric_name="accuracy",
        model=model,
        selection=parts["selection"],
        heldout=parts["heldout"],
        metric=accuracy,
        draw_inputs=lambda batch: heldout[:batch].clone(),
        train_step=lambda model, step: loss(model, 100_000 + step),
        train_steps=10 if quick else 200,
        learning_rate=5e-4,
        notes=["vit: scans of 8 x 8 pixels, 1000 to train on, 500 held out"],
    )
