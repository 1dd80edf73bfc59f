"""Small configurations of transformers' architectures: every size of a configuration class made small by its name."""

import dataclasses
import re
from typing import Any

WIDTH, HIDDEN, HEADS, KEY_HEADS, HEAD_DIM = 64, 128, 4, 2, 16
LAYERS, VOCABULARY, IMAGE, PATCH, POSITIONS, QUERIES = 2, 1000, 64, 16, 128, 10


def _at_most(limit: int):
    return lambda value: min(value, limit)


def _exactly(value: int):
    return lambda _: value


def _same(value: int) -> int:
    return value


# The first pattern that is found in a field's name says what becomes of its default; negative numbers stay.
_RULES = [
    (r"type_vocab_size|num_channels|chunk_size_feed_forward|num_stages|temporal|tubelet|merge|_ratio|^audio_channels", _same),
    (r"kernel|stride|padding|dilation|sampling|^num_codebooks|num_feature_levels|_points$|interval|^num_labels", _same),
    (r"coordinate_size|shape_size", _exactly(10)),
    (r"(^|_)vocab_size|_vocab$|_labels$|codebook_size|num_embeddings$|hash_buckets|head_out_channels|vocab_offset", _at_most(VOCABULARY)),
    (r"experts?_per_tok|top_?k$|moe_k$|num_selected|^topk|num_experts_per", _at_most(2)),
    (r"shared_experts?$|n_group$|topk_group|first_k_dense|num_dense_layers|zero_expert_num", _at_most(1)),
    (r"experts?$|expert_num$|num_codevectors_per_group", _at_most(4)),
    (r"(key_value|kv|key)_heads$", _at_most(KEY_HEADS)),
    (r"^head_dim$|head_dim$|d_kv|dim_head|attention_head_size|kv_channels|head_size$|rotary_dim|value_dim$|^key_dim", _at_most(HEAD_DIM)),
    (r"heads?$|^attention_heads", _at_most(HEADS)),
    (r"_rank$", _at_most(32)),
    (r"num_global_layers|_layer$|every_n|max_window_layers|_idx$", _at_most(1)),
    (r"layers?$|num_blocks|^depths?$|^n_layer|_layers_|repeats|inner_group_num|depth$|layer_num|blocks$|num_loops|passes$", _at_most(LAYERS)),
    (r"index(es)?$|indices$|indexes$|^extract_layers|hook_ids", None),
    (r"intermediate|ffn_dim|d_ff$|ffn_hidden|mlp_dim|n_inner|d_inner|dim_ff|feedforward|feed_forward|mlp_hidden|ffn_embed", _at_most(HIDDEN)),
    (r"max_source_positions|max_length$", _at_most(64)),
    (r"max_.*position|position_embeddings|max_seq|n_positions|^n_ctx|max_target|rel_extent", _at_most(POSITIONS)),
    (r"image_size|img_size|^resolution$|crop_size|spec_size", _at_most(IMAGE)),
    (r"patch_size", lambda value: PATCH if value >= 12 else value),
    (r"sliding_window|chunk_size|local_attention|attention_window|canvas_length|context_size", _at_most(8)),
    (r"window_size", _at_most(4)),
    (r"(image|mm|vision|audio).*(tokens_per_image|image_tokens|seq_length)", _at_most(4)),
    (r"num_queries|query_tokens|num_latents|num_query|proposals|num_denoising", _at_most(QUERIES)),
    (r"num_frames", _at_most(2)),
    (r"(state_size|d_state)$", _at_most(16)),
    (r"hidden_size|d_model|n_embd|emb(ed|edding)?s?_(dim|size)|_dims?$|^dim$|_channels$|_units$|_filters$|width$|"
     r"channels|hidden_dim|_size_out|^conv_dim|dims$|_planes", _at_most(WIDTH)),
]  # fmt: skip
_RULES = [(re.compile(pattern), rule) for pattern, rule in _RULES]

# Only where the rules give a configuration that can't be: model type -> fields, after the rules.
OVERRIDES: dict[str, dict[str, Any]] = {}


def _shrink(name: str, default: Any, layers: int | None) -> Any:
    """A small value for a field's default; the default itself where no rule knows better."""
    if isinstance(default, bool):
        return default
    if isinstance(default, (list, tuple)):
        if (
            layers is not None
            and len(default) == layers
            and layers > LAYERS
            and not re.search("dim|kernel|stride", name)
        ):
            return list(default[:LAYERS])  # one entry for each layer
        if re.search(r"index(es)?$|indices$|^extract_layers|hook_ids|_layers$", name) and all(
            type(v) is int for v in default
        ):
            return sorted({min(value, number) for number, value in enumerate(default[:LAYERS])})
        small = [_shrink(name, value, None) for value in default]
        return small if isinstance(default, list) else tuple(small)
    if not isinstance(default, int) or default < 0:
        return default
    for pattern, rule in _RULES:
        if pattern.search(name):
            return rule(default) if rule else min(default, 1) if "token" not in name else default
    return default


def _special_tokens(fields: dict[str, Any]) -> dict[str, int]:
    """Ids of special tokens within a small vocabulary, each its own."""
    small, number = {}, VOCABULARY
    for name, default in fields.items():
        if not re.search(r"_token_(id|index)$|_start_id$|_end_id$|_newline_id$|_token$|_index$|^eod_|_offset$", name):
            continue
        if type(default) is int and default >= VOCABULARY - 100:
            number -= 1
            small[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, number)
    return small


def defaults(cls: type) -> dict[str, Any]:
    """The fields of a configuration class and their defaults; None where there is none."""
    found = {}
    for field in dataclasses.fields(cls):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        else:
            found[field.name] = None
    return found


def small_fields(cls: type) -> dict[str, Any]:
    """What of a class's fields becomes small, by the rules and the table."""
    fields = defaults(cls)
    layers = next(
        (fields[n] for n in ("num_hidden_layers", "n_layer", "num_layers") if type(fields.get(n)) is int), None
    )
    changed = {}
    for name, default in fields.items():
        value = _shrink(name, default, layers)
        if value != default:
            changed[name] = value
    changed |= _special_tokens(fields)
    changed |= {name: value for name, value in OVERRIDES.get(cls.model_type, {}).items() if not isinstance(value, dict)}
    return changed


def small_config(cls: type, overrides: dict[str, Any] | None = None, depth: int = 0) -> Any:
    """A small configuration of a class, with small ones inside it.

    Raises:
        Exception: whatever the class raises for values that it does not take.
    """
    overrides = {**OVERRIDES.get(cls.model_type, {}), **(overrides or {})}
    values = {**small_fields(cls), **overrides}
    for name, spec in getattr(cls, "sub_configs_defaults", {}).items():
        inner = spec.config_class
        if not dataclasses.is_dataclass(inner) or inner.__name__ in ("PreTrainedConfig", "AutoConfig"):
            inner = spec.get_config_class(spec.model_type)
        given = {key: value for key, value in spec.init_kwargs.items() if not _known(key)}
        if name in overrides and overrides[name] is None:
            continue
        values[name] = small_config(inner, {**given, **overrides.get(name, {})}, depth + 1)
    return cls(**values)


def _known(name: str) -> bool:
    return any(pattern.search(name) for pattern, rule in _RULES if rule is not _same)
