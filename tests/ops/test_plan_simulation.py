"""Simulated steps from Python: the C core's figures arrive, orders are those of torch, bad input is named."""

import numpy as np
import pytest
from torch.distributed.pipelining import schedules as torch_schedules

from torch_sluice.plan import simulation
from torch_sluice.plan.simulation import SCHEDULES, Link, order, simulate

EVEN = {"forward_s": 1, "backward_input_s": 1, "backward_weight_s": 1}
KINDS = {
    "F": simulation.FORWARD,
    "B": simulation.BACKWARD,
    "I": simulation.BACKWARD_INPUT,
    "W": simulation.BACKWARD_WEIGHT,
}


def test_even_stages_have_the_bubble_of_the_papers():
    for p, m in ((1, 1), (2, 4), (4, 8), (8, 8)):
        for schedule in ("gpipe", "1f1b"):
            result = simulate(schedule, ranks=p, micro_batches=m, **EVEN)
            assert result.bubble_ratio == pytest.approx((p - 1) / m)
            assert result.bubble_share == pytest.approx((p - 1) / (m + p - 1))
            assert result.makespan_s == 3 * (m + p - 1)
        result = simulate("interleaved", ranks=p, micro_batches=m, stages_per_rank=4, **EVEN)
        assert result.bubble_ratio == pytest.approx((p - 1) / (4 * m))
        assert simulate("zb-h1", ranks=p, micro_batches=m, **EVEN).makespan_s == 3 * m + p - 1
    assert [rank.wait_s for rank in simulate("zbv", ranks=4, micro_batches=8, **EVEN).ranks] == [0] * 4


def test_every_argument_arrives_at_its_place():
    result = simulate(
        "1f1b",
        ranks=2,
        micro_batches=2,
        forward_s=[1, 2],
        backward_input_s=[3, 4],
        backward_weight_s=[5, 6],
        slowdowns=[1, 10],
        forward_bytes=[40, 1e6],
        backward_bytes=[1e6, 60],
        reduce_bytes=[70, 160],
        next_links=[Link(0.5, 10), Link(1e6, 1)],
        previous_links=Link(1e6, 1),  # with two ranks both ways are those to the next
        reduce_links=[Link(0.25, 10), Link(0.75, 20)],
        activation_bytes=[100, 200],
        events=True,
    )
    named = {tuple(event)[:4]: tuple(event)[4:] for event in result.events.tolist()}
    assert named[simulation.FORWARD, 0, 0, 0] == (0, 1)
    assert named[simulation.SEND_FORWARD, 0, 0, 0] == (1, 5.5)
    assert named[simulation.FORWARD, 1, 1, 0] == (5.5, 25.5)
    assert named[simulation.BACKWARD, 1, 1, 0] == (25.5, 125.5)
    begin, end = named[simulation.SEND_BACKWARD, 1, 1, 0]
    assert (begin, end - begin) == (125.5, 60 + 1e6)
    assert named[simulation.BACKWARD, 0, 0, 0] == (end, end + 8)
    for rank, seconds in ((0, 7.25), (1, 8.75)):
        begin, end = named[simulation.REDUCE, rank, rank, -1]
        assert begin == result.ranks[rank].end_s
        assert end - begin == pytest.approx(seconds)
    assert [rank.busy_s for rank in result.ranks] == [18, 240]
    assert [rank.peak_activations for rank in result.ranks] == [2, 1]
    assert [rank.peak_bytes for rank in result.ranks] == [200, 200]
    assert result.makespan_s == pytest.approx(result.compute_s + 7.25)
    assert result.event_count == len(result.events) == 14


def test_options_of_the_links_arrive():
    step = {"ranks": 2, "micro_batches": 2, "forward_bytes": 8, "backward_bytes": 8, "next_links": Link(0, 8), **EVEN}
    plain = simulate("1f1b", **step).makespan_s
    assert simulate("1f1b", **step, blocking_sends=True).makespan_s > plain
    step |= {"forward_s": 0, "backward_input_s": 0, "reduce_bytes": [0, 0, 0, 80]}
    apart = simulate("interleaved", **step)
    shared = simulate("interleaved", **step, shared_port=True, reduce_share=0.5)
    mostly = simulate("interleaved", **step, shared_port=True, reduce_share=0.9)
    assert apart.compute_s < shared.compute_s < mostly.compute_s
    held = {"ranks": 2, "micro_batches": 4, "activation_bytes": 10, **EVEN}
    assert [rank.peak_bytes for rank in simulate("zb-h1", **held).ranks] == [20, 20]
    assert [rank.peak_bytes for rank in simulate("zb-h1", **held, weight_bytes=4).ranks] == [20, 14]


def test_the_names_of_train_are_understood():
    assert simulate("zero-bubble", ranks=2, micro_batches=4, **EVEN).schedule == "zbv"
    other = simulate("interleaved-zero-bubble", ranks=2, micro_batches=4, **EVEN)
    assert (other.schedule, other.stages_per_rank) == ("zb-h1", 2)
    assert simulate("zb-h1", ranks=2, micro_batches=4, **EVEN).stages_per_rank == 1


def torch_order(kind, rank, ranks, stages_per_rank, micro_batches):
    """What torch's own schedule would do on a rank, without its stages and process groups."""
    schedule = object.__new__(kind)
    schedule.pp_group_size, schedule.n_local_stages = ranks, stages_per_rank
    schedule._n_microbatches, schedule.num_stages = micro_batches, ranks * stages_per_rank
    schedule.microbatches_per_round = micro_batches // max(1, micro_batches // ranks)
    actions = schedule._calculate_single_rank_operations(rank)
    return [
        (KINDS[action.computation_type.value], rank, action.stage_index, action.microbatch_index)
        for action in actions
        if action is not None
    ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("interleaved", torch_schedules.ScheduleInterleaved1F1B),
        ("zb-h1", torch_schedules.ScheduleInterleavedZeroBubble),
        ("zbv", torch_schedules.ScheduleZBVZeroBubble),
    ],
)
def test_orders_are_those_of_torch(name, kind):
    compared = 0
    for ranks in (1, 2, 3, 4, 6):
        for stages_per_rank in (1, 2, 3):
            for micro_batches in (1, 2, 3, 4, 6, 8, 12, 15):
                size = {"ranks": ranks, "stages_per_rank": stages_per_rank, "micro_batches": micro_batches}
                try:
                    orders = [order(name, **size, rank=rank).tolist() for rank in range(ranks)]
                except ValueError:
                    continue
                assert orders == [torch_order(kind, rank, **size) for rank in range(ranks)]
                compared += 1
    assert compared >= 40


def test_1f1b_has_the_order_of_megatron():
    work = order("1f1b", ranks=4, micro_batches=6, rank=2)
    letters = [f"{'FB'[kind]}{micro_batch}" for kind, _, _, micro_batch in work.tolist()]
    assert letters == ["F0", "F1", "B0", "F2", "B1", "F3", "B2", "F4", "B3", "F5", "B4", "B5"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedule": "zig"}, "schedule is 'zig', expected one of gpipe, 1f1b, interleaved, zb-h1, zbv"),
        ({"schedule": None}, "schedule is None, expected one of gpipe"),
        ({"schedule": ["1f1b"]}, r"schedule is \['1f1b'\], expected one of gpipe"),
        ({"ranks": 0}, "ranks is 0, expected 1 to 65536"),
        ({"ranks": 2.5}, "ranks is 2.5, expected a whole number"),
        ({"ranks": None}, "ranks is None, expected a whole number"),
        ({"micro_batches": 10**30}, f"micro_batches is {10**30}, expected a number of 64 bits"),
        ({"stages_per_rank": 3}, "stages_per_rank is 3, expected 1 with the schedule 1f1b"),
        ({"schedule": "interleaved", "micro_batches": 9}, "micro_batches is 9, expected a number that divides"),
        ({"forward_s": [1, 2]}, r"forward_s has the shape \[2\], expected one number, or 4: one for each stage"),
        ({"forward_s": "x"}, "forward_s is 'x', expected a number, or one for each stage"),
        ({"forward_s": None}, "forward_s is NULL, expected a time for each of 4 stages"),
        ({"backward_weight_s": [1, 1, -1, 1]}, r"backward_weight_s\[2\] is -1, expected 0 to 1e\+09"),
        ({"backward_input_s": float("nan")}, r"backward_input_s\[0\] is nan, expected 0 to 1e\+09"),
        ({"slowdowns": [1] * 5}, r"slowdowns has the shape \[5\], expected one number, or 4: one for each rank"),
        ({"next_links": 3}, r"next_links has the shape \[\], expected one Link\(latency_s, bytes_per_s\), or 4"),
        ({"next_links": Link(0, 0)}, r"next_links\[0\].bytes_per_s is 0, expected at least 1"),
        ({"reduce_links": ["a"]}, r"reduce_links is \['a'\], expected a Link"),
        ({"reduce_share": 1.5}, "reduce_share is 1.5, expected 0 to 0.99"),
        ({"reduce_share": None}, "reduce_share is None, expected a number"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        simulate(**{"schedule": "1f1b", "ranks": 4, "micro_batches": 8, **EVEN} | change)


def test_a_rank_outside_the_pipeline_is_named():
    with pytest.raises(ValueError, match="rank is 4, expected 0 to 3"):
        order("1f1b", ranks=4, micro_batches=6, rank=4)


def test_events_are_only_given_when_asked_for():
    for schedule in SCHEDULES:
        without = simulate(schedule, ranks=3, micro_batches=6, **EVEN)
        given = simulate(schedule, ranks=3, micro_batches=6, **EVEN, events=True)
        assert len(without.events) == 0
        assert len(given.events) == given.event_count == without.event_count
        assert np.unique(given.events[["kind", "stage", "micro_batch"]]).size == given.event_count
        assert given.events["end_s"].max() == given.makespan_s == without.makespan_s
