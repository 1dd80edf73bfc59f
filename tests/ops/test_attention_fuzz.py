"""Random calls of gated attention against the formula, on every tier that this processor has, with a fresh seed."""

import os
import time

import pytest
import torch
from support import attention_fuzz
from support.attention_fuzz import check_call, run_tiers

# Calls that once failed: name: (seed, choices), as the program prints them; what is left out is drawn from the seed.
FOUND = {
    "the gradient of a mask in half precision, from two passes that cancel": (
        53,
        dict(
            kind="dense", heads_kv=1, batch=1, group=1, n_q=17, n_k=8, head_dim=96, square=True, dtype=torch.float32,
            causal=True, tau=0.7, scale=-0.2, mode="post", q_offset=True, attn_mask=torch.bfloat16, spread=3.0,
        ),
    ),
    "no sequences, differentiated": (14, dict(kind="packed", sequences=0, n_q=0, n_k=2, dtype=torch.bfloat16)),
    # What follows was judged too narrowly once: right by as many roundings as a sum in float32 has.
    "gradients of keys summed over many queries": (
        1, dict(kind="dense", heads_kv=1, group=7, n_q=300, n_k=1, head_dim=256, dtype=torch.float16, spread=3.0),
    ),
    "exponents of large products of both signs": (
        2, dict(kind="dense", n_q=64, n_k=1100, square=False, head_dim=256, spread=3.0, scale=1.0, dtype=torch.float32),
    ),
    "a bend of scores that are far above the cap": (
        3, dict(kind="dense", n_q=17, n_k=33, square=False, softcap=50.0, scale=1.0, spread=3.0, head_dim=256),
    ),
    "five numbers, each rounded three times": (
        1796100807260,
        dict(kind="packed", heads_kv=1, group=2, n_q=2, n_k=1100, head_dim=1, dtype=torch.bfloat16, mode="post"),
    ),
    "a gradient that torch rounds as much": (
        1796102807042,
        dict(kind="dense", heads_kv=1, group=3, n_q=130, n_k=15, head_dim=1, dtype=torch.bfloat16, output_gate=True),
    ),
    "gates that are all but one": (4, {"kind": "dense", "n_q": 65, "spread of a": 30.0, "spread of b": 30.0}),
}  # fmt: skip


def test_random_calls_agree_with_the_formula():
    seconds, seed = float(os.environ.get("SLUICE_FUZZ_SECONDS", "60")), int(time.time()) * 1000
    text, passed = run_tiers(seconds, seed)
    print(text)
    assert passed, text


@pytest.mark.parametrize("seed", range(25))
def test_these_calls_agree_with_the_formula(seed):
    check_call(seed)


@pytest.mark.parametrize("name", FOUND)
def test_calls_that_once_failed(name):
    seed, choices = FOUND[name]
    check_call(seed, **choices)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["dense", "packed", "paged"])
@pytest.mark.parametrize("mode", ["select", "post", "log"])
def test_every_kind_and_mode(kind, mode, seed):
    check_call(seed, kind=kind, mode=mode)


def with_more_window(options, head_dim):
    return {"window": options["window"] + 1} if "window" in options else {}


FAULTS = {
    "a wider window": with_more_window,
    "another scale": lambda options, head_dim: {"scale": options.get("scale", head_dim**-0.5) * 1.002},
    "one sink less": lambda options, head_dim: {"sinks": options["sinks"] - 1} if "sinks" in options else {},
}
KINDS = {"dense": "gated_attention", "packed": "gated_attention_varlen", "paged": "gated_attention_paged"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAULTS)
def test_small_faults_are_seen(name, kind, monkeypatch):
    operator = getattr(attention_fuzz, KINDS[kind])

    def faulty(*inputs, **options):
        return operator(*inputs, **options | FAULTS[name](options, inputs[0].shape[-1]))

    monkeypatch.setattr(attention_fuzz, KINDS[kind], faulty)
    seen = 0
    for seed in range(60):
        try:
            check_call(seed, kind=kind)
        except AssertionError:
            seen += 1
        if seen >= 3:
            return
    raise AssertionError(f"{seen} of 60 calls showed the fault")


def test_a_failed_call_is_printed_so_that_it_comes_again(monkeypatch):
    monkeypatch.setattr(attention_fuzz, "gated_attention", lambda *inputs, **options: 1 / 0)
    with pytest.raises(AssertionError, match=r"in check_call\(7, kind='dense', .*\*\*\{'layout of q'"):
        check_call(7, kind="dense")
