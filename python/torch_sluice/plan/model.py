"""A model's shape from a transformers config, from a model that has one, or from plain numbers."""

from collections.abc import Mapping

from torch_sluice.plan.shapes import ModelShape, names_of

# What configs call the same number.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "head_dim": ("d_kv",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"),
    "vocab": ("vocab_size",),
    "sequence": ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
}
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_DROPOUT = ("resid_pdrop", "hidden_dropout_prob", "hidden_dropout", "residual_dropout", "dropout")
# Kinds whose MLP has a gate, though their config names no other activation than one without.
_GATED_TYPES = ("llama", "mistral", "qwen", "gemma", "phi3", "olmo", "cohere", "granite", "smollm", "glm", "helium")


def describe_model(model, **changes) -> ModelShape:
    """The shape of ``model``: a ModelShape, a transformers config or model, or a mapping of plain numbers.

    ``changes`` are members of ModelShape to take instead, most often ``sequence``: a config says the longest sequence
    that the model can take, not the one that it trains on. Raises ValueError for what a config lacks, by its name, for
    numbers that aren't whole, and for mixtures of experts, which the planner doesn't model.
    """
    unknown = set(changes) - set(names_of(ModelShape))
    if unknown:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}, expected members of ModelShape")
    if isinstance(model, ModelShape):
        values = {name: getattr(model, name) for name in names_of(ModelShape)}
        return ModelShape(**(values | changes))
    config = getattr(model, "config", model)
    if hasattr(config, "get_text_config"):  # of a model with several parts: the one that speaks
        config = config.get_text_config()
    read = config.get if isinstance(config, Mapping) else lambda name, default=None: getattr(config, name, default)
    for name in _EXPERTS:
        if isinstance(read(name), int) and read(name) > 1:
            raise ValueError(f"model has {name} = {read(name)}, expected one without experts: they aren't modelled")
    values = {member: changes.get(member, _first(read, (member, *names))) for member, names in _NAMES.items()}
    if values["hidden"] is not None and values["heads"] is not None:
        values["head_dim"] = values["head_dim"] or _whole("hidden", values["hidden"]) // _whole(
            "heads", values["heads"]
        )
    values["kv_heads"] = values["kv_heads"] or values["heads"]
    if values["ffn"] is None and values["hidden"] is not None:
        values["ffn"] = 4 * values["hidden"]
    for member, value in values.items():
        if value is None:
            raise ValueError(f"model lacks {member}, expected one of {', '.join((member, *_NAMES[member]))}")
        values[member] = _whole(member, value)
    flags = {
        "gated": _is_gated(read),
        "tied": bool(_default(read("tie_word_embeddings"), read("tied"), False)),
        "dropout": any(isinstance(read(name), (int, float)) and read(name) > 0 for name in _DROPOUT),
        "causal": bool(_default(read("causal"), True)),
        "kept_share": _default(read("kept_share"), 1.0),
    }
    return ModelShape(**(values | flags | changes))


def _first(read, names):
    return next((read(name) for name in names if read(name) is not None), None)


def _default(*values):
    return next(value for value in values if value is not None)


def _whole(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least 1")
    return value


def _is_gated(read):
    if read("gated") is not None:
        return bool(read("gated"))
    kind = str(read("model_type") or "")
    activation = str(_first(read, ("hidden_act", "hidden_activation", "activation_function")) or "")
    projection = str(read("feed_forward_proj") or "")
    return kind.startswith(_GATED_TYPES) or "silu" in activation or "glu" in activation or "gated" in projection
