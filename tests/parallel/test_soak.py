"""A short soak, the same in every run; `make soak` is the long one."""

import pytest
import torch
from parallel import soak


@pytest.mark.parametrize("size", [3, 5])
def test_random_collectives_agree_with_gloo(ranks, size):
    for number in range(3):
        ranks(size).run(soak.run_round, size, number, soak.OPERATIONS_OF_A_ROUND, seconds=300)


def test_what_differs_is_seen_and_named():
    half = torch.ones(3, dtype=torch.float16)
    soak.finish(("round 7", None, [half, half.new_zeros(0)], [half.clone(), half.new_zeros(0)]))
    for other in (half + 1, half.to(torch.bfloat16), half[:2], torch.tensor([1, 1, float("nan")], dtype=torch.float16)):
        with pytest.raises(AssertionError, match="^round 7: .* isn't Gloo's"):
            soak.finish(("round 7", None, [half], [other]))
