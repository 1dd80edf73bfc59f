"""The planner's Python face: devices from TOML, models from configs, and errors that name what is wrong."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_sluice.plan import Cluster, Layout, ModelShape, check, describe_model, device_names, load_cluster, predict
from torch_sluice.plan import device as device_module
from torch_sluice.plan.shapes import names_of
from torch_sluice.plan.units import parse_quantity

DEVICES = Path(device_module.__file__).parent / "devices"
MODEL = ModelShape(32, 4096, 32, 8, 128, 14336, 128256, 8192)
TEXT = (DEVICES / "h100-80g.toml").read_text()


def test_every_device_that_comes_with_the_package_can_be_planned_for():
    assert set(device_names()) >= {"a100-80g", "h100-80g", "h200", "b200", "cpu-host"}
    for name in device_names():
        cluster = load_cluster(name)
        estimate = predict(MODEL, cluster, Layout(8, 32, dp=4, tp=2))
        assert 0 < estimate.mfu < cluster.gemm_efficiency


def test_every_number_of_a_device_has_its_source_above_it():
    for path in DEVICES.glob("*.toml"):
        documented = False
        for line in path.read_text().splitlines():
            documented = line.startswith("#") or (documented and line.strip() != "")
            if "=" in line and not line.startswith("#"):
                assert documented or line.startswith("gpus_per_node") or "[fitted]" in path.read_text().split(line)[0]


def test_the_numbers_of_a_device_are_in_base_units():
    cluster = load_cluster("H100-80G")
    assert cluster.peak_flops == 989.4e12
    assert cluster.memory_bytes == 80 * 2**30
    assert cluster.inter_bandwidth == 50e9
    assert cluster.intra_latency == pytest.approx(3e-6)
    assert load_cluster(cluster, spread=0.5).spread == 0.5
    assert load_cluster("h100-80g", gpus_per_node=4).gpus_per_node == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"3.35 TB/s"', '"3.35"', "memory_bandwidth is '3.35', which has no unit, expected one of .*B/s"),
        ('"3.35 TB/s"', "3.35e12", "memory_bandwidth is 3350000000000.0 without a unit"),
        ('"3.35 TB/s"', '"3.35 TFLOP/s"', "memory_bandwidth is .*, which has the unit 'TFLOP/s'"),
        ('"3.35 TB/s"', "true", "memory_bandwidth is True, expected text of a number and a unit"),
        ('memory_bandwidth = "3.35 TB/s"', "", r"lacks memory_bandwidth in \[memory\]"),
        ('memory_bandwidth = "3.35 TB/s"', 'memory_bandwith = "3.35 TB/s"', r"lacks memory_bandwidth in \[memory\]"),
        ("gpus_per_node = 8", "gpus_per_node = 8.5", "gpus_per_node is 8.5, expected a whole number"),
        ("gpus_per_node = 8", 'gpus_per_node = 8\nrails = "8"', "has rails, expected no others than"),
        ("[fitted]", "[guessed]", r"lacks gemm_efficiency in \[fitted\]"),
        ("[compute]", "[compute", "is no TOML"),
        ("[network]", "network = 1\n[other]", "network is 1, expected a table"),
    ],
)
def test_a_wrong_description_is_refused_by_name(tmp_path, old, new, message):
    assert old in TEXT
    path = tmp_path / "mine.toml"
    path.write_text(TEXT.replace(old, new, 1) if "network = 1" not in new else "network = 1\n")
    with pytest.raises(ValueError, match=f"(?s)mine.toml.*{message}"):
        load_cluster(path)


def test_an_unknown_device_is_answered_with_the_known_ones():
    with pytest.raises(FileNotFoundError, match="cluster is 'h1000', expected one of a100-80g, b200"):
        load_cluster("h1000")


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_for_a_quantity_is_a_number_or_a_value_error(text):
    try:
        assert parse_quantity("x", text, "rate") == parse_quantity("x", text, "rate")
    except ValueError as error:
        assert str(error).startswith("x is ")  # noqa: PT017


@given(st.lists(st.tuples(st.integers(0, 2000), st.characters(codec="utf-8")), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_a_damaged_description_is_read_or_refused(tmp_path_factory, damages):
    characters = list(TEXT)
    for place, character in damages:
        characters[place % len(characters)] = character
    path = tmp_path_factory.mktemp("toml") / "damaged.toml"
    path.write_text("".join(characters), encoding="utf-8")
    try:
        cluster = load_cluster(path)
        predict(MODEL, cluster, Layout(1, 1))
    except ValueError as error:
        assert ", expected " in str(error) or "lacks" in str(error) or "no TOML" in str(error)  # noqa: PT017


def test_models_from_transformers_configs():
    transformers = pytest.importorskip("transformers")
    llama = transformers.LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192,
    )  # fmt: skip
    assert describe_model(llama) == MODEL
    assert describe_model(llama, sequence=1024) == replace(MODEL, sequence=1024)
    gpt2 = describe_model(transformers.GPT2Config())
    assert (gpt2.layers, gpt2.hidden, gpt2.ffn, gpt2.kv_heads) == (12, 768, 3072, 12)
    assert (gpt2.gated, gpt2.tied, gpt2.dropout) == (False, True, True)
    with pytest.raises(ValueError, match="model has num_local_experts = 8, expected one without experts"):
        describe_model(transformers.MixtralConfig())


def test_parameters_are_those_of_the_model_that_the_config_makes():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    estimate = predict(describe_model(model), load_cluster("cpu-host"), Layout(1, 1))
    final_norm = 64
    assert estimate.parameters == sum(parameter.numel() for parameter in model.parameters()) - final_norm


JUNK = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**20), st.floats(), st.text(max_size=4), st.lists(st.none())
)


@given(
    st.dictionaries(st.sampled_from(["model_type", "hidden_act", "num_experts", "tied", *names_of(ModelShape)]), JUNK)
)
@settings(max_examples=300, deadline=None)
def test_a_damaged_config_is_taken_or_refused(damages):
    numbers = {"layers": 4, "hidden": 256, "heads": 4, "ffn": 512, "vocab": 1000, "sequence": 128}
    try:
        shape = describe_model(numbers | damages)
        assert predict(shape, load_cluster("b200"), Layout(1, 1)).step_s > 0
    except ValueError as error:
        assert ", expected " in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"hidden_size": 64}, "model lacks layers, expected one of layers, num_hidden_layers, n_layer"),
        ({"hidden": 64, "layers": 2.5, "heads": 4, "vocab": 9, "sequence": 8}, "layers is 2.5, expected a whole"),
        ({"hidden": 64, "layers": 0, "heads": 4, "vocab": 9, "sequence": 8}, "layers is 0, expected a whole"),
        ("gpt", "model lacks layers"),
    ],
)
def test_a_model_that_says_too_little_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        describe_model(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(gpus=0), "gpus is 0, expected 1 to"),
        (dict(gpus=3, tp=3), "heads is 32, expected a multiple of tp = 3"),
        (dict(gpus=16), r"gpus is 16, expected dp \* tp \* pp \* cp = 1"),
        (dict(schedule="zigzag"), "schedule is 'zigzag', expected one of gpipe, 1f1b, interleaved"),
        (dict(micro_batch=1.5), "micro_batch is 1.5, expected a whole number"),
        (dict(margin="much"), "margin is 'much', expected a number"),
        (dict(global_batch=None), "global_batch is None, expected a whole number"),
        (dict(global_batch=2**80), "global_batch is 1208925819614629174706176, expected a whole number"),
        (dict(margin=float("nan")), "margin is nan, expected 0 to 1"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(changes, message):
    layout = replace(Layout(1, 8), **changes)
    for function in (predict, check):
        with pytest.raises(ValueError, match=message):
            function(MODEL, load_cluster("h100-80g"), layout)


def test_a_fused_reduction_of_bytes_shows_in_the_estimate():
    cluster, layout = load_cluster("a100-80g"), Layout(16, 64, dp=16, dp_overlap=False)
    full, half = predict(MODEL, cluster, layout), predict(MODEL, cluster, replace(layout, reduce_bytes=2.0))
    assert half.dp_s < full.dp_s
    sparse = predict(replace(MODEL, kept_share=0.25), cluster, layout)
    assert sparse.compute_s < full.compute_s
    assert sparse.model_flops < full.model_flops


@given(st.sampled_from(names_of(Cluster)), st.one_of(st.floats(), st.integers(), st.none(), st.text(max_size=3)))
@settings(max_examples=200, deadline=None)
def test_any_value_in_a_cluster_is_taken_or_refused_by_name(name, value):
    cluster = replace(load_cluster("h100-80g"), **{name: value})
    try:
        assert predict(MODEL, cluster, Layout(8, 8, tp=8)).step_s > 0
    except ValueError as error:
        assert name in str(error)  # noqa: PT017
