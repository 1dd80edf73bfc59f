"""Proves that a group can be cut: the model without its units gives what the model gives that acts as if they had left.

The first is run with parameters cut in place, the second by the tracer with the elements zeroed that these units make
(tracer.py). Where outputs differ, channels reach something that the group does not hold, or in another order; then the
group is refused, with a sentence. Many groups are proved in one pair of runs, and only a pair that differs is divided.
"""

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.compress.attributes import ways_to_count
from torch_sluice.compress.calling import call_model, describe_error, evaluating, float_outputs
from torch_sluice.compress.graph import ChannelGroup, advice
from torch_sluice.compress.outputs import is_masked
from torch_sluice.compress.slicing import Lost, Order, cut_in_order, gather, order_for
from torch_sluice.compress.tracer import trace

_STEPS = (1, 4, 8)  # units that leave at a time, where operators want sizes that are multiples
_FEW = 8  # units, of which each is tried alone
_SHARES = (0.2, 0.4, 0.6, 0.8)  # of units that leave, for which their order is looked at
_DOES_NOT_RUN = "the model does not run without some of it"
_TOLERANCE = 5e-4  # of the largest output, for float32


def prove(
    model: nn.Module, candidates: list[list[ChannelGroup]], inputs: list[Any], report: Callable[[str], None]
) -> tuple[list[ChannelGroup], list[str]]:
    """Of each layer's candidates the first that holds, without those that share channels with one before; and sentences
    about layers of which none does."""
    groups, notes = [], []
    likely = [replace(ways[0], sizes=ways_to_count(model, ways[0])[0]) for ways in candidates]
    with varied_constants(model, {m.name for ways in candidates for g in ways for m in g.members}):
        proved = _prove_together(model, likely, inputs, report)
        groups = [first for first in likely if id(first) in proved]
        others = []
        for number, other in _that_run(model, candidates, likely, groups, inputs):
            likely[number] = other
            others.append(other)
        proved |= _prove_together(model, others, inputs, report)
        groups = [first for first in likely if id(first) in proved]
        for ways, first in zip(candidates, likely, strict=True):
            if id(first) in proved:
                continue
            report(first.name)
            good, reason = _first_that_holds(model, [way for way in ways if _is_free(way, groups)], inputs)
            if good is not None:
                groups.append(good)
            elif reason is not None:  # else its channels leave with units of another group
                notes.append(f"{first.name}: stays, because {reason}")
        groups = _without_overlaps(groups)
        if len(groups) > 1 and len(groups) > len(proved):
            groups, more = _all_together(model, groups, inputs)
            notes += more
        groups, more = _with_order(model, groups, inputs)
    return groups, notes + more


def _first_that_holds(model, ways: list[ChannelGroup], inputs) -> tuple[ChannelGroup | None, str | None]:
    """The first way to form units that holds, with what counts them; or why the first does not."""
    reason = None
    for steps in _trials(model, ways):
        for trial in steps:
            wrong = _difference(model, [trial], inputs)
            if wrong is None:
                return trial, None
            reason = reason or wrong + advice(trial.moves)
            if not wrong.startswith(_DOES_NOT_RUN):
                break
    return None, reason


def _trials(model, ways: list[ChannelGroup]) -> Iterator[Iterator[ChannelGroup]]:
    """For each way to form units, and each to count them, those with more and more units that leave at a time."""
    for way in _with_arranged(ways):
        for sizes in ways_to_count(model, way):
            steps = [step for step in _STEPS if step == 1 or (way.width % step == 0 and way.width >= 4 * step)]
            yield (replace(way, sizes=sizes, step=step) for step in steps)


def _that_run(model, candidates, likely, groups, inputs) -> Iterator[tuple[int, ChannelGroup]]:
    """Of layers of which nothing is proved yet and whose likely group does not run when it is cut: the first that does,
    with its number. That is seen without following any channel, and they are proved together then."""
    proved = {id(group) for group in groups}
    for number, ways in enumerate(candidates):
        if id(likely[number]) in proved or _runs_without(model, likely[number], inputs, 0):
            continue
        free = [way for way in ways if _is_free(way, groups)]
        trials = itertools.chain.from_iterable(_trials(model, free))
        other = next((trial for trial in trials if _runs_without(model, trial, inputs, 0)), None)
        if other is not None:
            yield number, other


def _with_arranged(ways: list[ChannelGroup]) -> list[ChannelGroup]:
    """These, and behind the first, where slices move it, as x[:, 5:] and then x[:, :5] do, the same with weights that
    may lie in another order."""
    again = [replace(way, arranged=True) for way in ways[:1] if way.moves and not way.arranged]
    return ways[:1] + again + ways[1:]


def _is_free(group: ChannelGroup, groups: list[ChannelGroup]) -> bool:
    return len(_without_overlaps([*groups, group])) > len(groups)


def _without_overlaps(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Groups that share an index of a parameter's dimension with one before them go."""
    taken: dict[tuple[str, int], set[int]] = {}
    result = []
    for group in groups:
        own: Lost = {}
        gather(group.members, range(group.width), own)
        if any(taken.get(side, set()) & indices for side, indices in own.items()):
            continue
        for side, indices in own.items():
            taken.setdefault(side, set()).update(indices)
        result.append(group)
    return result


def _prove_together(model, groups: list[ChannelGroup], inputs, report) -> set[int]:
    """ids of the groups that hold. One draw finds those that do not, which are few; the others are proved by all."""
    likely = _sift(model, groups, inputs, report, draws=1)
    return {id(group) for group in _sift(model, likely, inputs, report)}


def _sift(model, groups: list[ChannelGroup], inputs, report, draws: int | None = None) -> list[ChannelGroup]:
    """The groups that hold, found by halving."""
    held: list[ChannelGroup] = []
    work = [groups] if groups else []
    while work:
        part = [group for group in work.pop() if _is_free(group, held)]
        if not part:
            continue
        report(part[0].name)
        whole = _without_overlaps(part)
        rest = [group for group in part if not any(group is other for other in whole)]
        if rest:
            work.insert(0, rest)  # last: most leave with units that are proved by then
        wrong = _first_wrong(model, whole, inputs, draws)
        if wrong is None:
            held += whole
        elif len(whole) > 1:
            able = whole
            if wrong[1].startswith(_DOES_NOT_RUN):
                able = [group for group in whole if _runs_without(model, group, inputs, wrong[0])]
            half = len(whole) // 2
            work += [able] if len(able) < len(whole) else [whole[half:], whole[:half]]
    return held


def _all_together(model, groups, inputs) -> tuple[list[ChannelGroup], list[str]]:
    """Groups that hold one by one, without those that do not beside the others."""
    if _difference(model, groups, inputs) is None:
        return groups, []
    good, notes = [], []
    for group in groups:
        reason = _difference(model, [*good, group], inputs[:1])
        if reason is None:
            good.append(group)
        else:
            notes.append(f"{group.name}: stays, because beside the cuts before it {reason}")
    return good, notes


def _with_order(model, groups, inputs) -> tuple[list[ChannelGroup], list[str]]:
    """Groups whose channels slices take at fixed places hold for some draws without another order. Those that need one
    for others are proved again with it; and units of channels of several kinds by more draws, since of some kinds an
    order may put too few to where the code takes them."""
    sliced = [group for group in groups if group.moves and not group.arranged]
    moved: set[tuple[str, int]] = set()
    for number, share in enumerate(_SHARES if sliced else ()):
        units = _random_units(sliced, [max(1, int(group.width * share)) for group in sliced], number)
        moved.update(sliced[0].arranger.order(model, *_cut_of(sliced, units)))
    good, notes = [], []
    for group in groups:
        reason = None
        if any(group is one for one in sliced) and any((member.name, member.dim) in moved for member in group.members):
            group = replace(group, arranged=True)
            reason = _difference(model, [group], inputs)
        if group.arranged and group.channels > 1:
            for units in _telling_units(group):
                reason = reason or _difference_without(model, [group], [units], inputs[0])
        if reason is None:
            good.append(group)
        else:
            notes.append(f"{group.name}: stays, because {reason}{advice(group.moves)}")
    return good, notes


def _difference(
    model: nn.Module, groups: list[ChannelGroup], inputs: list[Any], draws: int | None = None
) -> str | None:
    """What is wrong when random units of all of these groups are cut, or None; ``draws``: only the first so many."""
    wrong = _first_wrong(model, groups, inputs, draws)
    return None if wrong is None else wrong[1]


def _first_wrong(model, groups: list[ChannelGroup], inputs: list[Any], draws: int | None) -> tuple[int, str] | None:
    """The number of the first draw of units with which something is wrong, and what."""
    for number, (example, removals) in enumerate(islice(_draws(groups, inputs), draws)):
        reason = _difference_without(model, groups, _random_units(groups, removals, number), example)
        if reason is not None:
            return number, reason
    return None


def _difference_without(model, groups: list[ChannelGroup], units: list[list[int]], example: Any) -> str | None:
    """What is wrong when these units of each group are cut, or None."""
    lost, sizes = _cut_of(groups, units)
    order = order_for(groups, model, lost, sizes)
    return difference_of_cut(model, lost, sizes, example, *([order] if order else []))


def _runs_without(model, group: ChannelGroup, inputs: list[Any], number: int) -> bool:
    """Whether the model runs when units of this group alone are cut, as many as in this draw of several groups: seen
    without following any channel."""
    draws = list(_draws([group], inputs))
    example, removals = draws[min(number, len(draws) - 1)]
    lost, sizes = _cut_of([group], _random_units([group], removals, number))
    order = order_for([group], model, lost, sizes)
    return _run_cut(model, lost, sizes, example, order)[1] is None


def _cut_of(groups: list[ChannelGroup], units: list[list[int]]) -> tuple[Lost, list]:
    """What goes with these units of each group, and what counts them."""
    lost, sizes = {}, []
    for group, own in zip(groups, units, strict=True):
        gather(group.members, own, lost)
        sizes += [(member, len(own)) for member in group.sizes]
    return lost, sizes


def _random_units(groups: list[ChannelGroup], removals: list[int], number: int) -> list[list[int]]:
    """So many units of each group; ``number``: of the draw."""
    units = []
    for group, remove in zip(groups, removals, strict=True):
        chosen = random.Random(number * 7919 + group.width)
        remove = min(-(-remove // group.step), group.width // group.step - 1) * group.step
        units.append(chosen.sample(range(group.width), remove))
    return units


def _telling_units(group: ChannelGroup) -> list[list[int]]:
    """Units of a group whose cuts tell whether all its units are alike: each of a few, or some of many."""
    if group.width <= _FEW and group.step == 1:
        return [[unit] for unit in range(group.width)]
    return [_random_units([group], [int(group.width * share)], number)[0] for number, share in enumerate(_SHARES)]


def _draws(groups: list[ChannelGroup], inputs: list[Any]) -> Iterator[tuple[Any, list[int]]]:
    """Inputs, with how many units of each group to cut: half of all and a quarter on further inputs; and single ones of
    some groups. Half of the units may happen to leave each part of a layer as many, and groups that only run when they
    lose as many would pass together: of any two, one is cut without the other, and of each, one unit."""
    yield inputs[0], [max(1, group.width // 2) for group in groups]
    for example in inputs[1:]:
        yield example, [max(1, group.width // 4) for group in groups]
    if len(groups) == 1 and groups[0].width < 4:
        return  # half of it was one
    for bit in range(len(groups).bit_length()):
        yield inputs[0], [number >> bit & 1 for number in range(1, len(groups) + 1)]


def difference_of_cut(model: nn.Module, lost: Lost, sizes, inputs: Any, order: Order | None = None) -> str | None:
    """What is wrong with this cut, in this order, on these inputs, as part of a sentence, or None."""
    with torch.random.fork_rng(devices=[]):
        outputs, reason = _run_cut(model, lost, sizes, inputs, order)
        if reason is not None:
            return reason
        torch.manual_seed(0)
        try:
            _, expected, _ = trace(model, inputs, lost)
        except Exception as error:
            return f"the model does not run while its channels are followed ({describe_error(error)})"
    if [out.shape for out in outputs] != [out.shape for out in expected]:
        return "its channels are the model's output"
    difference = _relative(outputs, expected)
    if difference <= _tolerance(expected):
        return None
    return f"without some of it the outputs differ by {difference:.2g} of the largest from what they are with it silent"


def _run_cut(model: nn.Module, lost: Lost, sizes, inputs: Any, order: Order | None) -> tuple[list[Tensor], str | None]:
    """The outputs of the model without these channels, or why there are none, as part of a sentence."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            undo = cut_in_order(model, lost, sizes, order or {})
        except Exception as error:
            return [], f"it cannot be cut ({describe_error(error)})"
        try:
            with evaluating(model), torch.no_grad():
                return float_outputs(call_model(model, inputs)), None
        except Exception as error:
            return [], f"{_DOES_NOT_RUN} ({describe_error(error)})"
        finally:
            undo()


def _tolerance(outputs: list[Tensor]) -> float:
    coarsest = max((torch.finfo(out.dtype).eps for out in outputs), default=0.0)
    return max(_TOLERANCE, 8 * coarsest)


def _relative(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor; what is masked must stay so."""
    worst = 0.0
    for out, wanted in zip(outputs, expected, strict=True):
        finite = wanted.isfinite() & ~is_masked(wanted)
        if not torch.equal(finite, out.isfinite() & ~is_masked(out)):
            return float("inf")
        if bool(finite.any()):
            out, wanted = out[finite].double(), wanted[finite].double()
            scale, error = float(wanted.abs().max()), float((out - wanted).abs().max())
            worst = max(worst, error / scale if scale else float(error > 0))
    return worst


@contextlib.contextmanager
def varied_constants(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Gives parameters that are constant, as norms are before training, and those that are next to nothing, other
    values for a while: what is the same everywhere, or 0, would prove nothing."""
    tensors = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers()) if name in names}
    generator, before = torch.Generator().manual_seed(0), []
    try:
        for tensor in tensors.values():
            if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.device.type != "cpu":
                continue
            low, high = (float(x) for x in tensor.detach().aminmax())
            if high - low > 1e-4 * max(abs(high), abs(low)) and max(abs(high), abs(low)) > 1e-4:
                continue
            noise = torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
            before.append((tensor, tensor.data))
            if low > 0:
                tensor.data = low * (0.5 + noise) if low > 1e-4 else 0.5 + noise
            else:
                fan = tensor[0].numel() if tensor.dim() > 1 else 1
                tensor.data = (low + (noise - 0.5) * (2 / max(1, fan) ** 0.5 if fan > 1 else 0.2)).to(tensor.dtype)
        yield
    finally:
        for tensor, data in before:
            tensor.data = data
