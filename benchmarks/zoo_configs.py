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


def _power_of_two_at_most(limit: int):
    return lambda value: 1 << (min(value, limit).bit_length() - 1) if value else 0


# The first pattern that is found in a field's name says what becomes of its default; negative numbers stay.
_RULES = [
    (r"type_vocab_size|num_channels|chunk_size_feed_forward|num_stages|temporal|tubelet|merge|_ratio", _same),
    (r"^audio_channels|kernel|stride|padding|dilation|sampling|^num_codebooks|num_feature_levels|_points$", _same),
    (r"patch_embed_hidden_size|interval|^num_labels|^num_levels|_loss_|feat_strides", _same),
    (r"coordinate_size", _exactly(10)),
    (r"shape_size", _exactly(12)),
    (r"codebook_size", _power_of_two_at_most(256)),
    (r"(^|_)vocab_size|_vocab$|_labels$|num_embeddings$|hash_buckets|vocab_offset", _at_most(VOCABULARY)),
    (r"head_out_channels", _at_most(VOCABULARY)),
    (r"experts?_per_tok|(?<!index_)top_?k$|moe_k$|num_selected|^topk$|num_experts_per", _at_most(2)),
    (r"shared_experts?$|n_groups?$|topk_group|first_k_dense|num_dense_layers|zero_expert_num", _at_most(1)),
    (r"experts?$|expert_num$|num_codevectors_per_group|^num_groups$", _at_most(4)),
    (r"(key_value|kv|key)_heads$", _at_most(KEY_HEADS)),
    (r"head_dim$|d_kv|dim_head|attention_head_size|kv_channels|head_size$|rotary_dim|value_dim$", _at_most(HEAD_DIM)),
    (r"^key_dim", _at_most(HEAD_DIM)),
    (r"heads?(_per_stage)?$|^attention_heads", _power_of_two_at_most(HEADS)),
    (r"_rank$|num_pos_feats", _at_most(WIDTH // 2)),
    (r"num_global_layers|_layer$|every_n|max_window_layers|_idx$", _at_most(1)),
    (r"layers?$|num_blocks|^depths?$|^n_layer|_layers_|repeats|inner_group_num|layer_num", _at_most(LAYERS)),
    (r"depth$|blocks(_per_stage)?$|num_loops|passes$|_numb_of_layers", _at_most(LAYERS)),
    (r"index(es)?$|indices$", None),
    (r"intermediate|ffn_dim|d_ff$|ffn_hidden|mlp_dim|n_inner|d_inner|dim_ff|feed_?forward", _at_most(HIDDEN)),
    (r"mlp_hidden|ffn_embed|_ffn$|^dff$", _at_most(HIDDEN)),
    (r"max_source_positions|max_length$|max_text_length", _at_most(64)),
    (r"context_length", _at_most(512)),
    (r"max_.*position|position_embeddings|max_seq|n_positions|^n_ctx|max_target|rel_extent", _at_most(POSITIONS)),
    (r"image_size|img_size|^resolution$|crop_size|spec_size", _at_most(IMAGE)),
    (r"patch_size", lambda value: PATCH if value >= 12 else value),
    (r"sliding_window|chunk_size|local_attention|attention_window|canvas_length|context_size", _at_most(8)),
    (r"window_size", lambda value: min(value, 2) if value < 64 else 64),
    (r"(image|mm|vision|audio).*(tokens_per_image|image_tokens|seq_length)", _at_most(4)),
    (r"num_queries|query_tokens|num_latents|num_query|proposals|num_denoising", _at_most(QUERIES)),
    (r"num_frames", _at_most(2)),
    (r"(state_size|d_state)$", _at_most(16)),
    (r"(num|n)_filters$", _at_most(8)),
    (r"base_channels", _at_most(32)),
    (r"hidden_size|d_model|d_latents|n_embd|emb(ed|edding)?s?_(dim|size)|_dims?$|^dim$", _at_most(WIDTH)),
    (r"_channels?$|_units$|(fpn|mask)_feature_size", _at_most(WIDTH)),
    (r"width$|channels|hidden_dim|_size_out|^conv_dim|dims$|_planes|dim_per_stage|upsample_groups", _at_most(WIDTH)),
]  # fmt: skip
_RULES = [(re.compile(pattern), rule) for pattern, rule in _RULES]

_INDICES = re.compile(r"index(es)?$|indices$|^extract_layers|hook_ids")

# Only where the rules give a configuration that can't be, or none that is small (3,200 samples of sound for a frame):
# model type -> fields, in place of the rules'.
_EFFICIENT = {"hidden_dim": 1280, "width_coefficient": 1.0, "depth_coefficient": 1.0}
_PROTEIN = {
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": HIDDEN,
}
_SERIES = {"prediction_length": 8, "context_length": 16}
OVERRIDES: dict[str, dict[str, Any]] = {
    "align_vision_model": _EFFICIENT,
    "autoformer": _SERIES,
    "cvt": {"depth": (1, 2, 3)},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "chameleon": {"vocabulary_map": {"<image>": 990}},
    "dinov3_convnext": {"hidden_sizes": [32, 64, 64, 64], "depths": [1, 1, 2, 1]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "emu3": {"vocabulary_map": {"<image>": 990}},
    "esm": {"vocab_size": 100},
    "efficientnet": _EFFICIENT,
    "evolla": {"protein_encoder_config": _PROTEIN},
    "EvollaModel": {"protein_encoder_config": _PROTEIN},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "informer": _SERIES,
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "mamba2": {"num_heads": 8},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "nemotron": {"num_key_value_heads": KEY_HEADS},
    "reformer": {"axial_pos_embds_dim": (32, 32)},
    "time_series_transformer": _SERIES,
    "vibevoice_acoustic_tokenizer_decoder": {"downsampling_ratios": [2, 4, 4], "depths": [2, 2, 2, 2]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
}


def _shrink(name: str, default: Any, layers: int | None) -> Any:
    """A small value for a field's default; the default itself where no rule knows better."""
    if isinstance(default, bool):
        return default
    if isinstance(default, (list, tuple)):
        by_layer = layers is not None and len(default) == layers > LAYERS
        if by_layer and not re.search("dim|kernel|stride", name):
            return list(default[:LAYERS])
        if _INDICES.search(name) and all(type(value) is int for value in default):
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
    if fields.get("head_dim", 0) is None and fields.get("hidden_size", 0) is not None:
        changed["head_dim"] = HEAD_DIM
    if "depths" in fields and type(fields.get("embed_dim")) is int:
        changed["embed_dim"] = WIDTH // 4  # each stage doubles it
    if "downsampling_ratios" in fields and "encoder_hidden_size" in fields:
        changed["encoder_hidden_size"] = WIDTH // 8  # likewise
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        changed["num_key_value_heads"] = HEADS  # latent attention has a key for each head
    if "mrope_section" in getattr(cls, "ignore_keys_at_rope_validation", ()):
        part = fields.get("partial_rotary_factor") or 1.0
        half = int(HEAD_DIM * part) // 2
        section = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
        changed["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}
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
        given = _given(inner, spec.init_kwargs)
        if name in overrides and overrides[name] is None:
            continue
        values[name] = small_config(inner, {**given, **overrides.get(name, {})}, depth + 1)
    return cls(**values)


def _given(cls: type, fields: dict[str, Any]) -> dict[str, Any]:
    """What an outer configuration asks of an inner one, but for sizes; outputs of layers that it no longer has become
    those of as many layers."""
    given = {name: value for name, value in fields.items() if type(value) is not int and "sizes" not in name}
    outputs = given.get("out_indices") or given.get("out_features")
    if outputs and type(defaults(cls).get("num_hidden_layers")) is int:
        given.pop("out_features", None)
        given |= {"num_hidden_layers": len(outputs), "out_indices": list(range(1, len(outputs) + 1))}
    return given
