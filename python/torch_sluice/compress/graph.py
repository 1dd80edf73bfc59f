"""Which channels hang together: groups of units, channels or heads, that can only leave a model together.

The model is run once and its channels are followed (tracer.py); from what met what come candidates for groups, each
with the indices that every unit has in every parameter. Each is proved on the model before it is offered (verify.py).
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torch_sluice.compress.arrangement import Arranger
from torch_sluice.compress.calling import call_model, evaluating
from torch_sluice.compress.couplings import Closing, Couplings, Move, Source
from torch_sluice.compress.labels import PICKED
from torch_sluice.compress.recording import keeping_recordings
from torch_sluice.compress.slicing import Member, SizeMember
from torch_sluice.compress.tracer import trace
from torch_sluice.compress.units import MOST_WORK, alike, partitions_of

_MOST_ADVICE = 2
_MOST_WAYS = 6  # of forming units from the channels of one layer


@dataclass
class ChannelGroup:
    """Channels of one or several parameters that leave together.

    ``width`` units of ``channels`` channels each (more than one for heads, and where grouped convolutions tie them).
    """

    name: str
    kind: str  # "channels" or "heads"
    width: int
    channels: int
    members: list[Member] = field(repr=False)
    sizes: list[SizeMember] = field(default_factory=list, repr=False)
    step: int = 1  # units leave by multiples of it
    counts: frozenset[int] = field(default_factory=frozenset, repr=False)  # of what its units make up
    moves: tuple[Move, ...] = field(default=(), repr=False)  # of its channels, by what the code says
    arranger: Arranger | None = field(default=None, repr=False)  # finds in which order what a cut leaves has to lie
    arranged: bool = False  # whether it is needed

    def kept_choices(self, fractions: tuple[float, ...], round_to: int) -> list[int]:
        """Units to keep for these shares, rounded down so that channels are a multiple of ``round_to`` where the layer
        is wide enough for that; descending, without repetitions, all below the width."""
        step = self.rounding(round_to)
        kept = {max(step, int(self.width * share / step) * step) for share in fractions}
        return sorted((k for k in kept if k < self.width), reverse=True)

    def rounding(self, round_to: int) -> int:
        """Units by which the kept number is rounded: fewer where a layer has not four times as many."""
        if self.kind == "heads":
            return self.step
        step = math.lcm(self.step, round_to // math.gcd(round_to, self.channels))
        while step > self.step and step * 4 > self.width:
            step = step // 2 if step // 2 % self.step == 0 else self.step
        return step


@keeping_recordings()
def find_groups(
    model: nn.Module, example_inputs: Any, report: Callable[[str], None] = lambda text: None, batches: list[Any] = ()
) -> tuple[list[ChannelGroup], list[str]]:
    """The groups of a model that can be pruned, and sentences about what cannot be and why.

    Args:
        model: left as it is.
        example_inputs: the path that the model takes for these is followed.
        report: called with the name of what is looked at.
        batches: more inputs on which each group is proved.
    """
    from torch_sluice.compress.verify import prove

    try:
        couplings, _, unknown = trace(model, example_inputs)
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        return [], [f"channels stay, because they could not be followed: {type(error).__name__}: {reason}"]
    candidates, notes = _candidates(couplings)
    arranger = Arranger(example_inputs)
    for group in itertools.chain.from_iterable(candidates):
        group.arranger, group.arranged = arranger, any(move.strict for move in group.moves)
    if unknown:
        notes.append(f"channels that reach {', '.join(sorted(unknown))} stay: these operators are not followed")
    more = [inputs for inputs in batches if _runs(model, inputs)]  # a metric may call the model otherwise
    unreached = _unreached(model, couplings)
    groups, refused = prove(model, candidates, [example_inputs, *more], report)
    if unreached:
        notes.append(
            f"not reached by example_inputs, and left alone: {', '.join(unreached)} (control flow that depends on "
            "data, or layers that are not used)"
        )
    return groups, notes + refused


def _runs(model: nn.Module, inputs: Any) -> bool:
    try:
        with evaluating(model), torch.no_grad():
            call_model(model, inputs)
    except Exception:
        return False
    return True


def _unreached(model: nn.Module, couplings: Couplings) -> list[str]:
    """Convolutions and linear layers whose weights met nothing."""
    names = {}
    for source in couplings.sources:
        numbers = slice(source.first, source.first + source.size)
        used = couplings.contracted[numbers].any() or couplings.survived[numbers].any()
        for name in couplings.names[id(couplings.tensors[source.name])]:
            names[name] = names.get(name, False) or bool(used)
    layers = (nn.modules.conv._ConvNd, nn.Linear)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, layers) and names.get(f"{name}.weight" if name else "weight") is False
    ]


def _candidates(couplings: Couplings) -> tuple[list[list[ChannelGroup]], list[str]]:
    """For each layer that makes channels the ways in which they may form units, the likelier first; and sentences about
    layers whose channels cannot leave."""
    closing = couplings.closing()
    roots = couplings.find(np.arange(couplings.original_count))
    atoms = _atoms(couplings, roots)
    splits = []
    for axis in (*couplings.splits, *couplings.parts):
        numbers = couplings.find(axis.numpy().ravel()).reshape(axis.shape)
        splits.append((axis, numbers, frozenset(numbers.ravel().tolist())))
    moves = [(frozenset(couplings.find(move.numbers).tolist()), move) for move in couplings.moves]
    found, notes, seen, met, without = [], [], set(), set(), []
    for source in couplings.sources:
        if not _makes_channels(couplings, source):
            continue
        own = roots[source.first : source.first + source.size]
        own_moves = [move for roots_moved, move in moves if not roots_moved.isdisjoint(own.tolist())]
        if not _can_leave(closing, own):
            notes.append(_why_frozen(_label(source.name), closing.why_frozen(own.tolist()), own_moves))
            continue
        if own.tobytes() in met:
            continue  # as all layers that write to a residual stream
        met.add(own.tobytes())
        name = _label(source.name)
        ways, frozen, begin = [], None, closing.work
        partitions = partitions_of(closing, own, splits)
        if own_moves:
            slices = [set(couplings.find(move.taken).tolist()) for move in own_moves if len(move.taken)]
            partitions = itertools.chain(partitions, alike(closing, own, atoms, slices))
        for units, rows in partitions:
            frozen = frozen or closing.why_frozen(set().union(*units))
            if frozen is not None or len(units) < 2:
                continue
            key = frozenset(units)
            if key in seen:
                continue
            seen.add(key)
            group = _make_group(name, units, rows, atoms, couplings)
            if group is not None:
                group.moves = tuple(move for roots, move in moves if not roots.isdisjoint(set().union(*units)))
                ways.append(group)
            if closing.work - begin > MOST_WORK or len(ways) == _MOST_WAYS:
                break  # channels that hang together with all positions of an image
        if frozen is not None:
            notes.append(_why_frozen(name, frozen, own_moves))
        if ways:
            found.append(ways)
        elif frozen is None:
            without.append((source, own_moves))
    for source, own_moves in without:
        if not _is_covered(source, found):
            notes.append(
                f"{_label(source.name)}: stays, because its channels form no units that are alike (some are read by "
                f"others, elsewhere, or not at all){advice(own_moves)}"
            )
    return found, notes


def _why_frozen(name: str, reason: str, moves: list[Move]) -> str:
    return f"{name}: stays, because {reason}{advice(moves) if reason == PICKED else ''}"


def advice(moves: Iterable[Move]) -> str:
    """What moves channels, to be put behind the reason why they stay; nothing where nothing does."""
    sentences = dict.fromkeys(move.advice for move in sorted(moves, key=lambda move: not move.strict))
    return "".join(f"; {sentence}" for sentence in itertools.islice(sentences, _MOST_ADVICE))


def _is_covered(source: Source, found: list[list[ChannelGroup]]) -> bool:
    """Whether all channels of a layer leave with those of others."""
    members = [m for ways in found for g in ways for m in g.members if (m.name, m.dim) == (source.name, source.dim)]
    return any(sum(map(len, member.indices)) == source.size for member in members)


def _label(name: str) -> str:
    """By which a parameter's layer is called in groups and notes."""
    return name.rpartition(".")[0] if name.endswith(".weight") else name


def _can_leave(closing: Closing, own: np.ndarray) -> bool:
    return not all(root in closing.frozen for root in own.tolist())


def _makes_channels(couplings: Couplings, source: Source) -> bool:
    """Whether a dimension is that of a layer's outputs."""
    if couplings.tensors[source.name].dim() < 2 or not couplings.tensors[source.name].is_floating_point():
        return False
    return bool(couplings.survived[source.first : source.first + source.size].all())


def _atoms(couplings: Couplings, roots: np.ndarray) -> dict[int, list[tuple[int, int]]]:
    """root -> [(number of a source, index)]: all that is equal."""
    atoms: dict[int, list[tuple[int, int]]] = {}
    for number, source in enumerate(couplings.sources):
        for index, root in enumerate(roots[source.first : source.first + source.size].tolist()):
            atoms.setdefault(root, []).append((number, index))
    return atoms


def _make_group(name, units, rows, atoms, couplings: Couplings) -> ChannelGroup | None:
    """None where units are not alike, so that none can leave without changing what the others are."""
    indices: dict[int, list[list[int]]] = {}
    for place, unit in enumerate(units):
        for root in unit:
            for source, index in atoms.get(root, ()):
                of_units = indices.get(source)
                if of_units is None:
                    of_units = indices[source] = [[] for _ in units]
                of_units[place].append(index)
    members, counts, most = [], set(), 1
    attended = False
    for number, of_unit in sorted(indices.items()):
        source = couplings.sources[number]
        sizes = {len(places) for places in of_unit}
        if len(sizes) != 1:
            return None
        each = sizes.pop()
        if each * len(units) == source.size:
            counts.add(source.size)
        numbers = slice(source.first, source.first + source.size)
        made, read = couplings.survived[numbers].any(), couplings.contracted[numbers].any()
        role = "in" if read and not made and couplings.tensors[source.name].is_floating_point() else "out"
        attended = attended or bool(couplings.attended[numbers].any())
        if role == "out" and made:
            most = max(most, each)
        members.append(Member(source.name, source.dim, role, tuple(tuple(sorted(p)) for p in of_unit)))
    owner = {root: place for place, unit in enumerate(units) for root in unit}
    for size, numbers in rows:
        flat = numbers.reshape(size, -1)
        if size % len(units) == 0 and all(len({owner.get(int(r)) for r in row}) == 1 for row in flat):
            counts.add(size)
    first = min((m for m in members if m.role == "out"), key=lambda m: m.name != f"{name}.weight", default=None)
    if first is None or len(units) < 2:
        return None
    heads = attended and most > 1
    channels = most if heads or most > 1 else 1
    label = f"{name} heads" if heads else name
    return ChannelGroup(
        label, "heads" if heads else "channels", len(units), channels, members, counts=frozenset(counts | {len(units)})
    )


def lowest(scores: Tensor, remove: int) -> list[int]:
    """The units with the smallest scores; of equal ones the last, so that the first are kept. NaN counts as largest."""
    scores = scores.nan_to_num(nan=math.inf, posinf=math.inf)
    order = torch.arange(len(scores) - 1, -1, -1)
    return sorted(order[scores.flip(0).argsort(stable=True)][:remove].tolist())
