"""Random inputs for any model of transformers, found from its forward's arguments and its configuration.

A plan says which arguments are given and how each is drawn; ``plans()`` lists those that may fit a model, the likeliest
first, and whoever builds the model takes the first that runs.
"""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

LENGTH, TARGET_LENGTH, FRAMES, SAMPLES = 12, 6, 64, 4000
_LATE = 850  # token ids from here on are special ones


def configs_within(config: Any) -> Iterator[Any]:
    """A configuration and all that it holds, the text's first."""
    yield config
    inner = [(name, value) for name, value in vars(config).items() if hasattr(value, "model_type")]
    for _, value in sorted(inner, key=lambda pair: not re.search("text|decoder|thinker", pair[0])):
        yield from configs_within(value)


def lookup(config: Any, *names: str, default: Any = None) -> Any:
    """The first of these attributes that a configuration or one within it has; a list gives its first entry."""
    for inner in configs_within(config):
        for name in names:
            value = getattr(inner, name, None)
            if isinstance(value, (list, tuple)) and value:
                value = value[0]
            if value is not None and not isinstance(value, (dict, list, tuple)):
                return value
    return default


@dataclass
class Draw:
    """One drawing of inputs: for how many rows, and whether rows of text are padded on the left."""

    model: nn.Module
    rows: int
    generator: torch.Generator
    padded: bool
    length: int = LENGTH
    special: dict[int, int] = field(default_factory=dict)  # special token id -> how many of them the text holds

    @property
    def config(self):
        return self.model.config

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def vocabulary(self) -> int:
        try:
            table = self.model.get_input_embeddings()
            if isinstance(table, nn.Embedding):
                return table.num_embeddings
        except (NotImplementedError, AttributeError):
            pass
        return lookup(self.config, "vocab_size", "text_vocab_size", "src_vocab_size", default=100)

    def text_length(self) -> int:
        return self.length + sum(self.special.values())

    def hidden(self, rows: int, length: int) -> Tensor:
        return self.normal(rows, length, lookup(self.config, "hidden_size", "d_model", "embed_dim", "dim", default=64))


def _tokens(draw: Draw, length: int | None = None) -> Tensor:
    high = min(draw.vocabulary(), _LATE)
    text = draw.integers(min(10, high // 2), high, draw.rows, length or draw.length)
    while draw.special and (again := sum(text == token for token in draw.special)).any():  # those stand for an image
        text = torch.where(again > 0, (text + 1) % high, text)
    for token, count in draw.special.items():
        if length is None:
            text = torch.cat([torch.full((draw.rows, count), token), text], 1)
    return text


def _mask(draw: Draw) -> Tensor:
    mask = torch.ones(draw.rows, draw.text_length(), dtype=torch.int64)
    if draw.padded and not draw.special:  # a row that begins with an image has no place for padding
        for row in range(1, draw.rows, 2):
            mask[row, : int(draw.integers(1, 5, 1))] = 0
    return mask


def _image_size(draw: Draw) -> int:
    return lookup(draw.config, "image_size", "img_size", "resolution", "crop_size", "input_size", default=64) or 64


def _channels(draw: Draw) -> int:
    return lookup(draw.config, "num_channels", "in_chans", "input_channels", default=3)


def _patches(draw: Draw) -> int:
    """Elements of one flattened patch."""
    patch, time = lookup(draw.config, "patch_size", default=16), lookup(draw.config, "temporal_patch_size", default=1)
    return lookup(draw.config, "in_channels", "num_channels", "in_chans", default=3) * time * patch * patch


def _frames(draw: Draw) -> int:
    return lookup(draw.config, "num_frames", "frames_per_clip", default=2)


def _mels(draw: Draw) -> int:
    return lookup(
        draw.config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "n_mels", "feature_size",
        "input_feat_size", "input_dim", "n_mel_bins", default=80,
    )  # fmt: skip


def _history(draw: Draw) -> int:
    lags = getattr(draw.config, "lags_sequence", None) or [0]
    return (lookup(draw.config, "context_length", "prediction_length", default=32)) + max(lags)


def _boxes(draw: Draw) -> Tensor:
    corner = draw.integers(0, 50, draw.rows, draw.length, 2)
    return torch.cat([corner, corner + draw.integers(1, 50, draw.rows, draw.length, 2)], -1)


# Argument -> the ways in which it may have to be drawn, the likeliest first.
VARIANTS: dict[str, list[Callable[[Draw], Any]]] = {
    "input_ids": [
        _tokens,
        lambda d: d.integers(10, 100, d.rows, d.length, lookup(d.config, "num_codebooks", "n_codebooks", default=4)),
        lambda d: d.integers(10, 100, d.rows * lookup(d.config, "num_codebooks", default=4), d.length),
    ],
    "attention_mask": [_mask],
    "decoder_input_ids": [
        lambda d: _tokens(d, TARGET_LENGTH),
        lambda d: d.integers(10, 100, d.rows * lookup(d.config, "num_codebooks", default=4), TARGET_LENGTH),
        lambda d: d.integers(10, 100, d.rows, TARGET_LENGTH, lookup(d.config, "num_channels", default=9)),
    ],
    "pixel_values": [
        lambda d: d.normal(d.rows, _channels(d), _image_size(d), _image_size(d)),
        lambda d: d.normal(d.rows, 1, _channels(d), _image_size(d), _image_size(d)),
        lambda d: d.normal(16 * d.rows, _patches(d)),
        lambda d: d.normal(d.rows, _frames(d), _channels(d), _image_size(d), _image_size(d)),
        lambda d: d.normal(d.rows, 16, _patches(d)),
        lambda d: d.normal(d.rows, 2, _channels(d), _image_size(d), _image_size(d)),
        lambda d: d.normal(16 * d.rows, _channels(d), lookup(d.config, "patch_size"), lookup(d.config, "patch_size")),
    ],
    "input_values": [
        lambda d: d.normal(d.rows, SAMPLES),
        lambda d: d.normal(d.rows, 1, SAMPLES),
        lambda d: d.normal(d.rows, lookup(d.config, "max_length", default=FRAMES), _mels(d)),
    ],
    "input_features": [
        lambda d: d.normal(d.rows, _mels(d), 2 * lookup(d.config, "max_source_positions", default=FRAMES // 2)),
        lambda d: d.normal(d.rows, FRAMES, _mels(d)),
        lambda d: d.normal(d.rows, 1, FRAMES, _mels(d)),
        lambda d: d.normal(d.rows, 1, _image_size(d), _mels(d)),
        lambda d: d.normal(_mels(d), 2 * FRAMES),
    ],
    "bbox": [_boxes, lambda d: _boxes(d).float() / 100],
    "image_grid_thw": [lambda d: torch.tensor([[1, 4, 4]] * d.rows)],
    "grid_thw": [lambda d: torch.tensor([[1, 4, 4]] * d.rows)],
    "image_sizes": [lambda d: torch.tensor([[_image_size(d), _image_size(d)]] * d.rows)],
    "hidden_states": [
        lambda d: d.hidden(d.rows, d.length),
        lambda d: d.normal(16 * d.rows, _patches(d)),
        lambda d: d.normal(d.rows, _channels(d), _image_size(d), _image_size(d)),
        lambda d: d.normal(d.rows, lookup(d.config, "input_channels", "hidden_size", default=64), 16),
    ],
    "inputs_embeds": [lambda d: d.hidden(d.rows, d.length)],
    "encoder_hidden_states": [lambda d: d.hidden(d.rows, 8)],
    "past_values": [
        lambda d: d.normal(d.rows, _history(d)),
        lambda d: d.normal(d.rows, _history(d), lookup(d.config, "num_input_channels", "input_size", default=1)),
    ],
    "past_time_features": [
        lambda d: d.normal(d.rows, _history(d), lookup(d.config, "num_time_features", default=0))
    ],
    "future_time_features": [
        lambda d: d.normal(d.rows, lookup(d.config, "prediction_length"), lookup(d.config, "num_time_features"))
    ],
    "future_values": [lambda d: d.normal(d.rows, lookup(d.config, "prediction_length", default=24))],
    "past_observed_mask": [lambda d: torch.ones(d.rows, _history(d))],
    "flattened_patches": [
        lambda d: torch.cat([
            torch.stack(torch.meshgrid(torch.arange(1, 5.0), torch.arange(1, 5.0), indexing="ij"), -1)
            .reshape(1, 16, 2).expand(d.rows, 16, 2), d.normal(d.rows, 16, _patches(d))], -1)
    ],
    "states": [lambda d: d.normal(d.rows, 4, lookup(d.config, "state_dim", default=17))],
    "actions": [lambda d: d.normal(d.rows, 4, lookup(d.config, "act_dim", default=4))],
    "rewards": [lambda d: d.normal(d.rows, 4, 1)],
    "returns_to_go": [lambda d: d.normal(d.rows, 4, 1)],
    "timesteps": [lambda d: torch.arange(4).expand(d.rows, 4)],
    "visual_feats": [lambda d: d.normal(d.rows, 5, lookup(d.config, "visual_feat_dim", default=64))],
    "visual_pos": [lambda d: d.normal(d.rows, 5, lookup(d.config, "visual_pos_dim", default=4))],
    "noise": [lambda d: d.normal(d.rows, (_image_size(d) // lookup(d.config, "patch_size", default=16)) ** 2)],
    "spectrogram": [lambda d: d.normal(d.rows, 16, lookup(d.config, "model_in_dim", default=80))],
    "audio_codes": [lambda d: d.integers(0, 30, d.rows, lookup(d.config, "num_quantizers", default=4), 12)],
    "padding_mask": [lambda d: torch.ones(d.rows, SAMPLES, dtype=torch.int64)],
    "xpath_tags_seq": [lambda d: d.integers(0, 50, d.rows, d.length, lookup(d.config, "max_depth", default=50))],
    "xpath_subs_seq": [lambda d: d.integers(0, 50, d.rows, d.length, lookup(d.config, "max_depth", default=50))],
    "pixel_attention_mask": [
        lambda d: torch.ones(d.rows, 16, dtype=torch.int64),
        lambda d: torch.ones(d.rows, 1, _image_size(d), _image_size(d), dtype=torch.int64),
    ],
    "feature_attention_mask": [lambda d: torch.ones(d.rows, FRAMES, dtype=torch.int64)],
    "is_longer": [lambda d: torch.zeros(d.rows, 1, dtype=torch.bool)],
    "spatial_shapes": [lambda d: torch.tensor([[4, 4]] * d.rows)],
    "input_features_mask": [
        lambda d: torch.ones(d.rows, FRAMES, dtype=torch.int64), lambda d: torch.ones(d.rows, FRAMES, dtype=torch.bool),
    ],
    "mm_token_type_ids": [
        lambda d: torch.cat([torch.ones(d.rows, sum(d.special.values()), dtype=torch.int64),
                             torch.zeros(d.rows, d.length, dtype=torch.int64)], 1)
    ],
    "qformer_input_ids": [lambda d: d.integers(10, 100, d.rows, 6)],
    "input_points": [lambda d: d.integers(0, 60, d.rows, 1, 1, 2).float()],
    "pixel_values_videos": [lambda d: d.normal(d.rows, _frames(d), _channels(d), _image_size(d), _image_size(d))],
    "inputs": [lambda d: _tokens(d), lambda d: d.normal(d.rows, d.length, lookup(d.config, "d_model", default=64))],
}  # fmt: skip
TEXTS = {"input_ids", "decoder_input_ids", "bbox"}


@dataclass
class Plan:
    """Arguments of a forward and how each is drawn: name -> number of its variant."""

    variants: dict[str, int]
    special: dict[int, int] = field(default_factory=dict)

    def draw(self, model: nn.Module, rows: int, seed: int, padded: bool = False) -> dict[str, Tensor]:
        """Inputs by name for ``rows`` samples; a seed gives the same again."""
        draw = Draw(model, rows, torch.Generator().manual_seed(seed), padded, special=self.special)
        inputs = {name: VARIANTS[name][number](draw) for name, number in self.variants.items()}
        if padded and not self.special and "attention_mask" in inputs and "input_ids" in inputs:
            pad = lookup(model.config, "pad_token_id", default=0)
            inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, max(pad, 0))
        return inputs


def plans(model: nn.Module) -> Iterator[Plan]:
    """Plans that may fit a model: all that it takes of text, image and sound, then its main input alone."""
    arguments = inspect.signature(model.forward).parameters
    required = [n for n, p in arguments.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    if unknown := [name for name in required if name not in VARIANTS]:
        raise ValueError(f"no rule draws the argument {unknown[0]!r}")
    main = model.main_input_name if isinstance(getattr(model, "main_input_name", None), str) else "input_ids"
    main = (
        main if main in arguments and main in VARIANTS else next((n for n in arguments if n in VARIANTS), "input_ids")
    )
    first = list(dict.fromkeys([*required, main]))
    with_text = [*(n for n in ("attention_mask", "bbox") if n in arguments and "input_ids" in first)]
    target = [n for n in ("decoder_input_ids",) if n in arguments and main != n and n not in first]
    extra = [n for n in ("input_ids", "pixel_values", "input_features", "visual_feats", "visual_pos") if n in arguments]
    grids = [
        n
        for n in ("image_grid_thw", "image_sizes", "grid_thw", "noise", "mm_token_type_ids", "spatial_shapes")
        if n in arguments
    ]
    time = [n for n in ("past_time_features", "past_observed_mask", "future_time_features") if n in arguments]
    choices = []
    if "visual_feats" in arguments:
        first += ["visual_feats", "visual_pos"]
    if {"input_ids", "pixel_values"} <= set(arguments):
        choices += [[*first, *extra, *with_text, *grids, *target], [*first, *extra, *with_text, *target]]
    sound = [
        n for n in ("input_features", "is_longer", "input_features_mask", "feature_attention_mask") if n in arguments
    ]
    if sound and "input_ids" in arguments:
        choices += [[*first, "input_ids", *sound, *with_text, *target], [*first, "input_ids", *sound[:1], *with_text]]
    choices += [[*first, *extra[:1], *with_text, *target], [*first, *with_text, *target, *time, *grids]]
    choices += [[*first, *with_text, *target], [*first, *with_text], [*first, *target], first, [*first, *grids]]
    if "inputs_embeds" in arguments and "input_ids" not in arguments:
        choices.append(["inputs_embeds"])
    seen = set()
    for choice in choices:
        names = tuple(dict.fromkeys(choice))
        if names in seen:
            continue
        seen.add(names)
        yield Plan(dict.fromkeys(names, 0))
        for name in names if len(names) < 3 else [name for name in names if name not in TEXTS] or names:
            for number in range(1, len(VARIANTS[name])):
                yield Plan({**dict.fromkeys(names, 0), name: number})


def tokens_asked_for(error: Exception, model: nn.Module, rows: int) -> dict[int, int] | None:
    """How many image or audio tokens a model misses in the text of one row, by the message of its error."""
    found = re.search(r"(image|audio|video) tokens do not match\D*?(\d+)\D+?(\d+)", str(error), re.IGNORECASE)
    if not found:
        return None
    kind, features = found[1].lower(), int(found[3])
    width = lookup(model.config, "hidden_size", default=64)
    if features >= 8 * width and features % (rows * width) == 0:
        features //= width  # some count the elements
    token = lookup(model.config, f"{kind}_token_id", f"{kind}_token_index")
    return None if token is None or features % rows else {int(token): features // rows}
