"""Cuts and shares from Python: every argument arrives, and bad input is named."""

import math

import pytest

from torch_sluice.plan.cuts import cut_layers, share_micro_batches
from torch_sluice.plan.simulation import simulate


def test_even_layers_are_cut_evenly():
    assert cut_layers([1] * 8, 4) == ((0, 2, 4, 6, 8), 2, 8)


def test_every_argument_of_a_cut_arrives():
    layers = [1.0] * 6
    assert cut_layers(layers, 2, factors=[1, 2]).first == (0, 4, 6)
    assert cut_layers(layers, 2, extra_s=[0, 4]).first == (0, 5, 6)
    assert cut_layers(layers, 2, extra_s=[0, 9], least_layers=0).first == (0, 6, 6)
    assert cut_layers(layers, 2, layer_bytes=[10] * 6, limits=[20, 100]).first == (0, 2, 6)
    assert cut_layers(layers, 2, kept_bytes=[10] * 6, limits=[100, 100]).first == (0, 3, 6)
    assert cut_layers(layers, 2, kept_bytes=[10] * 6, kept=[5, 1], limits=[100, 100]).first == (0, 2, 6)
    assert cut_layers(layers, 2, layer_bytes=[10] * 6, extra_bytes=[90, 0], limits=[100, 100]).first == (0, 1, 6)
    # Two micro-batches wait less for a slow stage than they do for a slow sum.
    uneven = {"factors": [1, 1.5]}
    assert cut_layers([1] * 6, 2, bottleneck_weight=0, **uneven).first == (0, 5, 6)
    assert cut_layers([1] * 6, 2, bottleneck_weight=7, **uneven).first == (0, 4, 6)


def test_a_cut_has_the_shortest_simulated_step():
    layers, factors, micro_batches = [3, 1, 4, 1, 5, 9, 2, 6], [1, 2, 1], 4

    def step(first):
        times = [factor * sum(layers[i:j]) for factor, i, j in zip(factors, first, first[1:], strict=False)]
        parts = [time / 3 for time in times]
        arguments = {"forward_s": parts, "backward_input_s": parts, "backward_weight_s": parts}
        return simulate("gpipe", ranks=3, micro_batches=micro_batches, **arguments).makespan_s

    cut = cut_layers(layers, 3, factors=factors, bottleneck_weight=micro_batches - 1)
    assert step(cut.first) == pytest.approx(min(step((0, i, j, 8)) for i in range(1, 7) for j in range(i + 1, 8)))
    assert step(cut.first) == pytest.approx((micro_batches - 1) * cut.max_s + cut.sum_s)


def test_shares_follow_the_speeds():
    assert share_micro_batches([1, 1, 2], 10) == ((4, 4, 2), 4)
    assert share_micro_batches([1, 1, 2], 10, most=[3, 9, 9]) == ((3, 5, 2), 5)
    assert share_micro_batches([1, 1, 2], 10, fixed_s=[4, 0, 0]) == ((2, 6, 2), 6)
    assert share_micro_batches([1, 100], 4).micro_batches == (3, 1)
    assert share_micro_batches([1, 100], 4, least=0).micro_batches == (4, 0)


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (([1, 1], 3), {}, "least_layers is 1, expected at most 0: there are 2 layers for 3 stages"),
        (([], 1), {}, "layers is 0, expected 1 to 16384"),
        (([1, -1], 1), {}, r"layer_s\[1\] is -1, expected 0 to 1e\+09"),
        ((3, 1), {}, "layer_s is 3, expected a number for each layer"),
        ((["a"], 1), {}, r"layer_s is \['a'\], expected a number for each layer"),
        (([1, 1], 0), {}, "stages is 0, expected 1 to 4096"),
        (([1, 1], 1.5), {}, "stages is 1.5, expected a whole number"),
        (([1, 1], 2), {"factors": [1]}, "factors has 1 values, expected 2: one for each stage"),
        (([1, 1], 2), {"layer_bytes": [1]}, "layer_bytes has 1 values, expected 2: one for each layer"),
        (([1, 1], 2), {"bottleneck_weight": None}, "bottleneck_weight is None, expected a number"),
        (([1, 1], 2), {"bottleneck_weight": math.nan}, "bottleneck_weight is nan, expected at least 0"),
        (
            ([1] * 4, 2),
            {"layer_bytes": [9] * 4, "limits": [20, 10]},
            "limits leave room for the first 3 of 4 layers, expected room for all",
        ),
    ],
)
def test_bad_cuts_are_named(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        cut_layers(*arguments, **changes)


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (([1, 1], 1), {}, "least is 1, expected 0 to 0: there are 1 micro-batches for 2 ranks"),
        (([1, 0], 4), {}, r"micro_batch_s\[1\] is 0, expected 1e-12 to 1e\+09"),
        (([1, 1], None), {}, "micro_batches is None, expected a whole number"),
        (([1, 1], 4), {"most": [1, 1]}, "most leaves room for 2 micro-batches, expected 4"),
        (([1, 1], 4), {"most": [4]}, "most has 1 values, expected 2: one for each rank"),
        (([1, 1], 4), {"most": [4, 0.5]}, r"most\[1\] is 0.5, expected a whole number"),
        (([1, 1], 4), {"fixed_s": [4]}, "fixed_s has 1 values, expected 2: one for each rank"),
    ],
)
def test_bad_shares_are_named(arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        share_micro_batches(*arguments, **changes)
