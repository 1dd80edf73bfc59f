"""What a pruned model will take: each layer the share of its measured time that it keeps of its weights."""

import math
from collections import defaultdict

from torch import nn

from torch_sluice.compress.graph import ChannelGroup
from torch_sluice.compress.slicing import layer_of

Side = tuple[str, int]  # name of a parameter, dimension


class Prediction:
    """Counts, for any plan, how much is left of the weights of every layer that groups cut.

    Groups share no index, so what they take from one side of a weight adds up.
    """

    def __init__(self, model: nn.Module, groups: list[ChannelGroup]):
        tensors = {name: t for name, t in (*model.named_parameters(), *model.named_buffers()) if t.dim() > 1}
        self._widths = [group.width for group in groups]
        self._takes: dict[Side, list[tuple[int, int]]] = defaultdict(list)  # side -> (group, indices of each unit)
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)  # layer -> its weights
        self._paths: list[list[str]] = []  # layers that each group cuts
        for g, group in enumerate(groups):
            paths = {}
            for member in group.members:
                if member.name in tensors:
                    path = layer_of(member.name)
                    paths[path] = None
                    self._shapes[path][member.name] = tuple(tensors[member.name].shape)
                    self._takes[member.name, member.dim].append((g, len(member.indices[0])))
            self._paths.append(list(paths))

    @property
    def layers(self) -> list[str]:
        return list(self._shapes)

    def share(self, path: str, kept: dict[int, int]) -> float:
        """Of a layer's weights, those that are left."""
        whole = left = 0
        for name, shape in self._shapes.get(path, {}).items():
            sizes = list(shape)
            for dim in range(len(shape)):
                for g, each in self._takes.get((name, dim), ()):
                    sizes[dim] -= each * (self._widths[g] - kept.get(g, self._widths[g]))
            whole += math.prod(shape)
            left += math.prod(sizes)
        return left / whole if whole else 1.0

    def seconds(self, spent: dict[str, float], kept: dict[int, int]) -> float:
        """Of all layers; ``spent``: what each was measured to take."""
        cut = {path for g in kept for path in self._paths[g]}
        return sum(seconds * (self.share(path, kept) if path in cut else 1.0) for path, seconds in spent.items())

    def saving(self, spent: dict[str, float], kept: dict[int, int], g: int, count: int) -> float:
        """Seconds that are won when group ``g`` keeps ``count`` units beside what ``kept`` says."""
        after = {**kept, g: count}
        return sum(
            spent[path] * (self.share(path, kept) - self.share(path, after)) for path in self._paths[g] if path in spent
        )
