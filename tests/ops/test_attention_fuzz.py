"""Random calls of gated attention against the formula, on every tier that this processor has, with a fresh seed."""

import os
import time

import pytest
from support import attention_fuzz
from support.attention_fuzz import check_call, run_tiers

FOUND: list[int] = []  # seeds of calls that once failed


def test_random_calls_agree_with_the_formula():
    seconds, seed = float(os.environ.get("SLUICE_FUZZ_SECONDS", "60")), int(time.time()) * 1000
    text, passed = run_tiers(seconds, seed)
    print(text)
    assert passed, text


@pytest.mark.parametrize("seed", [*range(40), *FOUND])
def test_these_calls_agree_with_the_formula(seed):
    check_call(seed)


FAULTS = {
    "a wider window": lambda options, head_dim: {"window": options["window"] + 1} if "window" in options else {},
    "another scale": lambda options, head_dim: {"scale": options.get("scale", head_dim**-0.5) * 1.002},
    "one sink less": lambda options, head_dim: {"sinks": options["sinks"] - 1} if "sinks" in options else {},
}


@pytest.mark.parametrize("name", FAULTS)
def test_small_faults_are_seen(name, monkeypatch):
    operator = attention_fuzz.gated_attention

    def faulty(*inputs, **options):
        return operator(*inputs, **options | FAULTS[name](options, inputs[0].shape[3]))

    monkeypatch.setattr(attention_fuzz, "gated_attention", faulty)
    seen = 0
    for seed in range(60):
        try:
            check_call(seed)
        except AssertionError:
            seen += 1
    assert seen >= 3
