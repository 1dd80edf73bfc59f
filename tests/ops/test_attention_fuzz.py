"""Random calls of gated attention against the formula, on every tier that this processor has, with a fresh seed."""

import os
import time

import pytest
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
