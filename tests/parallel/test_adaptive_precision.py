"""The rule behind the adaptive all-reduce, and the books it keeps of buckets, without any ranks."""

import pytest
import torch

from torch_sluice.parallel import AdaptiveAllReduce
from torch_sluice.parallel.buckets import Buckets
from torch_sluice.parallel.compression import BLOCK, FORMATS
from torch_sluice.parallel.precision import LEVELS, AutoPrecision, FixedPrecision, Record, choose_format, measure


def normal(elements=8 * BLOCK, seed=0):
    return torch.randn(elements, generator=torch.Generator().manual_seed(seed))


def choose(values, record, policy, underflow=0, ranks=2):
    rows = [measure(values, record, underflow, ranks)] * ranks
    return choose_format(policy, record, rows, values.numel(), roundings=2)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_a_message_is_read_as_it_was_meant(name, scale):
    format, values = FORMATS[name], scale * normal()
    message = torch.empty(format.message_bytes(values.numel()), dtype=torch.uint8)
    assert format.encode(values, message) == 0
    decoded = torch.empty_like(values)
    format.decode(message, decoded)
    relative = (decoded - values).double().norm() / values.double().norm()
    expected = {"int8": 7.4e-3, "float16": 2e-4, "bfloat16": 1.6e-3}[name]  # what the rule predicts
    assert expected / 1.3 < relative < expected * 1.3
    again, whole = torch.empty_like(message), torch.zeros_like(values)
    format.encode(whole, again)
    format.decode(again, decoded)
    assert decoded.eq(0).all()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_not_finite_stays_so(name):
    values = normal(2 * BLOCK)
    values[BLOCK + 3], values[BLOCK + 5] = float("nan"), float("inf")
    format = FORMATS[name]
    message, decoded = torch.empty(format.message_bytes(2 * BLOCK), dtype=torch.uint8), torch.empty_like(values)
    format.encode(values, message)
    format.decode(message, decoded)
    assert decoded[:BLOCK].isfinite().all()
    assert not decoded[BLOCK + 3].isfinite()
    assert not decoded[BLOCK + 5].isfinite()


def test_underflow_is_counted_and_int8_flushes_what_has_no_step():
    values = normal(BLOCK)
    values[:100] = 1e-12
    message = torch.empty(FORMATS["float16"].message_bytes(BLOCK), dtype=torch.uint8)
    assert FORMATS["float16"].encode(values, message) == 100
    tiny = torch.full((BLOCK,), 1e-42)
    message, decoded = torch.empty(FORMATS["int8"].message_bytes(BLOCK), dtype=torch.uint8), torch.empty(BLOCK)
    FORMATS["int8"].encode(tiny, message)
    FORMATS["int8"].decode(message, decoded)
    assert decoded.eq(0).all()


def test_auto_takes_the_fewest_bytes_within_the_tolerance():
    heavy = normal() ** 5  # of a crest factor beyond int8
    assert choose(normal(), Record(), AutoPrecision(3e-2)) == "int8"
    assert choose(torch.zeros(BLOCK), Record(), AutoPrecision(3e-2)) == "int8"
    assert choose(heavy, Record(), AutoPrecision(1e-2)) == "float16"
    assert choose(normal(), Record(), AutoPrecision(2e-3)) == "float16"
    assert choose(normal(), Record(), AutoPrecision(3e-3), underflow=500) == "bfloat16"
    assert choose(normal(), Record(), AutoPrecision(2e-3), underflow=500) == "float32"
    assert choose(normal(), Record(), AutoPrecision(1e-5)) == "float32"


def test_fewer_bytes_are_tried_again_later_each_time():
    policy, record, waits = AutoPrecision(3e-2), Record(), []
    heavy = torch.zeros(8 * BLOCK)
    heavy[::BLOCK], heavy[1::2] = 1.0, 0.01
    for _ in range(4):
        assert choose(heavy, record, policy) == "float16"
        wait = 0
        while choose(normal(), record, policy) != "int8":
            wait += 1
        waits.append(wait)
    assert waits == [3, 7, 15, 31]
    choose(heavy, record, policy)
    for seed in range(40):  # a gradient in between that is not calm starts the wait anew
        assert choose(heavy if seed % 20 == 19 else normal(), record, policy) == "float16"


@pytest.mark.parametrize("policy", [AutoPrecision(3e-2), *map(FixedPrecision, LEVELS)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_goes_in_float32_and_teaches_nothing(policy, value):
    record, values = Record(), normal()
    values[17] = value
    assert choose(values, record, policy) == "float32"
    assert record == Record()


# ---- buckets


def parameters_of(sizes):
    return [torch.nn.Parameter(torch.zeros(size)) for size in sizes]


def fill(buckets, layouts, value=None):
    channels = [buckets.channel(index, layout) for index, layout in enumerate(layouts)]
    for channel, layout in zip(channels, layouts, strict=True):
        if value is not None:
            channel.residual = torch.cat([torch.full((p.numel(),), value(p)) for p in layout])
    return channels


def test_what_is_unsent_moves_with_its_parameter_when_buckets_are_rebuilt():
    a, b, c, d = parameters = parameters_of([3, 3, 4, 5])
    place = {id(p): float(i + 1) for i, p in enumerate(parameters)}
    buckets = Buckets(AdaptiveAllReduce()._options)
    first = fill(buckets, [[d, c], [b, a]], lambda p: place[id(p)])
    assert fill(buckets, [[d, c], [b, a]]) == first
    rebuilt = fill(buckets, [[c, b], [a, d]])
    assert [channel.residual.tolist() for channel in rebuilt] == [[3.0] * 4 + [2.0] * 3, [1.0] * 3 + [4.0] * 5]
    late = fill(buckets, [[c, b], [d], [a]])  # only the second bucket changes
    assert late[0] is rebuilt[0]
    assert [channel.residual.tolist() for channel in late[1:]] == [[4.0] * 5, [1.0] * 3]


def test_buckets_come_back_from_a_state_in_any_layout():
    options = AdaptiveAllReduce()._options
    a, b, c = parameters_of([3, 3, 4])
    buckets = Buckets(options)
    fill(buckets, [[c], [b, a]])  # as DDP begins: the same before and after
    place = {id(a): 1.0, id(b): 2.0, id(c): 3.0}
    for channel in fill(buckets, [[c, a], [b]], lambda p: place[id(p)]):
        channel.record.level = 1
    state = buckets.state_dict()

    other = Buckets(options)
    other.load_state_dict(state)
    a, b, c = parameters_of([3, 3, 4])
    begun = fill(other, [[c], [b, a]])
    assert [channel.residual.tolist() for channel in begun] == [[3.0] * 4, [2.0] * 3 + [1.0] * 3]
    assert [channel.record.level for channel in begun] == [0, 0]
    assert other.state_dict()["unsent"].keys() == state["unsent"].keys()
    rebuilt = fill(other, [[c, a], [b]])
    assert [channel.residual.tolist() for channel in rebuilt] == [[3.0] * 4 + [1.0] * 3, [2.0] * 3]
    assert [channel.record.level for channel in rebuilt] == [1, 1]

    another = Buckets(options)
    another.load_state_dict(state)
    smaller = fill(another, [parameters_of([2]), parameters_of([3, 3])])  # another shape: dropped
    assert [channel.residual.tolist() for channel in smaller] == [[0.0] * 2, [2.0] * 3 + [1.0] * 3]
