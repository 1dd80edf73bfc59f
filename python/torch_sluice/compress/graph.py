"""Which channels hang together: groups of channels that can only leave a model together.

Torch-Pruning's dependency graph follows channels from layer to layer; what is made of it here is a list of groups
with, for each prunable unit, the indices that it has in every module. Each group is tried on a copy of the model before
it is offered, so that what the graph misses ends in a sentence and not in a broken model.
"""

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from torch_sluice.compress.attention import AttentionLayer, find_attention, make_opaque
from torch_sluice.compress.calling import call_model, describe_shapes, evaluating, float_outputs
from torch_sluice.compress.slicing import Member, gather, side_of, size_of, take_out


@dataclass
class ChannelGroup:
    """Channels of one or several modules that leave together.

    ``width`` units of ``channels`` channels each (more than one in grouped convolutions and for heads); the number of
    units kept must be a multiple of ``step``, and at least ``step``.
    """

    name: str
    kind: str  # "channels" or "heads"
    width: int
    channels: int
    step: int
    members: list[Member] = field(repr=False)

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
        units = round_to // math.gcd(round_to, self.channels)
        step = math.lcm(self.step, units)
        while step > self.step and (step * 4 > self.width or step % self.step):
            units = max(1, units // 2)
            step = math.lcm(self.step, units)
        return step


def find_groups(
    model: nn.Module, example_inputs: Any, report: Callable[[str], None] = lambda text: None
) -> tuple[list[ChannelGroup], list[str]]:
    """The groups of a model that can be pruned, and sentences about what cannot be and why.

    The model is traced on a copy, on the path that it takes for ``example_inputs``.
    """
    layers, notes = find_attention(model)
    candidates = [
        ChannelGroup(f"{layer.path} heads", "heads", layer.kv_heads, layer.head_dim, 1, layer.head_members())
        for layer in layers
        if layer.join is not None and layer.kv_heads > 1
    ]
    try:
        traced, unreached = _trace_channels(model, example_inputs, layers, notes)
        candidates += traced
        if unreached:
            notes.append(
                f"not reached by example_inputs, and left alone: {', '.join(unreached)} (control flow that depends on "
                "data, or layers that are not used)"
            )
    except Exception as error:
        notes.append(f"channels stay, because the model could not be traced: {type(error).__name__}: {error}")
    groups = []
    with evaluating(model), torch.no_grad():
        expected = describe_shapes(float_outputs(call_model(model, example_inputs)))
    for group in candidates:
        report(group.name)
        reason = _try(group, model, example_inputs, expected)
        if reason is None:
            groups.append(group)
        else:
            notes.append(f"{group.name}: stays, because {reason}")
    return groups, notes


def _trace_channels(model, example_inputs, layers: list[AttentionLayer], notes) -> tuple[list[ChannelGroup], list[str]]:
    import torch_pruning

    traced = copy.deepcopy(model).eval()
    for parameter in traced.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    classes = set(make_opaque(traced, layers))
    pruner = _leaf_pruner(torch_pruning)
    called = _record_calls(traced)
    side_outputs = _record_outputs(traced, classes)

    def outputs_of(output):
        """The model's outputs, and those of layers that do not lead there: the graph goes backwards from outputs."""
        outputs = [t for t in float_outputs(output) if t.grad_fn is not None]
        return outputs + _off_the_way(outputs, side_outputs)

    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph().build_dependency(
            traced,
            example_inputs=example_inputs,
            forward_fn=call_model,
            output_transform=outputs_of,
            customized_pruners=dict.fromkeys(classes, pruner),
            verbose=False,
        )
        roots = (nn.modules.conv._ConvNd, nn.Linear, nn.Embedding)
        found = list(graph.get_all_groups(root_module_types=roots))
    names = {module: name for name, module in traced.named_modules()}
    by_path = {layer.path: layer for layer in layers}
    groups, seen = [], set()
    for items in found:
        name = names[items[0].dep.target.module]
        try:
            group = _convert(name, items, graph, names, by_path)
        except ValueError as reason:
            notes.append(f"{name}: stays, because {reason}")
            continue
        key = frozenset((member.path, member.side) for member in group.members)
        if key not in seen:
            seen.add(key)
            groups.append(group)
    leaves = (nn.modules.conv._ConvNd, nn.Linear)
    return groups, [name for name, m in model.named_modules() if isinstance(m, leaves) and name not in called]


def _record_calls(traced: nn.Module) -> set[str]:
    called: set[str] = set()
    for name, module in traced.named_modules():
        module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
        if isinstance(module, nn.MultiheadAttention):  # calls no submodule
            module.register_forward_pre_hook(lambda module, args, name=name: called.add(f"{name}.out_proj"))
    return called


def _record_outputs(traced: nn.Module, opaque: set[type]) -> list[Tensor]:
    """The outputs of all layers outside of opaque ones, filled while the model runs."""
    outputs: list[Tensor] = []

    def record(module, args, output):
        if output.grad_fn is not None:
            outputs.append(output)

    hidden = {inner for module in traced.modules() if type(module) in opaque for inner in module.modules()}
    for module in traced.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)) and module not in hidden:
            module.register_forward_hook(record)
    return outputs


def _off_the_way(outputs: list[Tensor], candidates: list[Tensor]) -> list[Tensor]:
    """Those tensors from which no output was computed, without those that lead to another of them."""
    reached, stack, ends = set(), [out.grad_fn for out in outputs], []

    def reach():
        while stack:
            node = stack.pop()
            if node is not None and node not in reached:
                reached.add(node)
                stack.extend(following for following, _ in node.next_functions)

    reach()
    for candidate in reversed(candidates):  # the last comes from the others, not the other way round
        if candidate.grad_fn not in reached:
            ends.append(candidate)
            stack.append(candidate.grad_fn)
            reach()
    return ends


def _leaf_pruner(torch_pruning):
    """What Torch-Pruning asks of an attention layer: an input and an output side; cutting is not its business."""

    class Leaf(torch_pruning.BasePruningFunc):
        def prune_out_channels(self, layer, idxs):
            return layer

        def prune_in_channels(self, layer, idxs):
            return layer

        def get_out_channels(self, layer):
            return layer.embed_dim if isinstance(layer, nn.MultiheadAttention) else None

        def get_in_channels(self, layer):
            return layer.embed_dim if isinstance(layer, nn.MultiheadAttention) else None

    return Leaf()


def _convert(name, items, graph, names, layers) -> ChannelGroup:
    """A group of Torch-Pruning, which lists a module with indices and the root's indices that they come from."""
    root = items[0].dep.target.module
    count = size_of(root, side_of(root, "out") or "out")
    raw: list[tuple[str, str, dict[int, set[int]]]] = []
    ties = _Union(count)
    multiple = 1
    for item in items:
        target, module = item.dep.target, item.dep.target.module
        outwards = graph.is_out_channel_pruning_fn(item.dep.handler) and not _is_input(graph, item.dep)
        indices: dict[int, set[int]] = {}
        if any(root_index is None for root_index in item.root_idxs):
            raise ValueError("the dependency graph loses track of its channels")
        for index, root_index in zip(item.idxs, item.root_idxs, strict=True):
            indices.setdefault(root_index, set()).add(index)
        if isinstance(module, nn.Parameter):
            dim = target.pruning_dim % module.dim()
            raw.append((graph._param_to_name[module], f"dim {dim}", indices))
        elif type(module).__name__ == "_OutputOp":
            raise ValueError("its channels are the model's output")
        elif module in names and names[module] in layers:
            raw.append((names[module], "layer out" if outwards else "layer in", indices))
        elif module in names:
            side = side_of(module, "out" if outwards else "in")
            if side is None:
                raise ValueError(f"{names[module]} ({type(module).__name__}) cannot be cut")
            raw.append((names[module], side, indices))
            _tie_places(ties, module, side, indices)
            if isinstance(module, nn.MultiheadAttention):
                if not module._qkv_same_embed_dim or module.bias_k is not None:
                    raise ValueError(f"{names[module]} has separate projections or biases for keys, which are not cut")
                multiple = math.lcm(multiple, module.num_heads)
    for _, _, indices in raw:  # channels that share an element somewhere go together
        owner: dict[int, int] = {}
        for root_index, places in indices.items():
            for place in places:
                ties.join(owner.setdefault(place, root_index), root_index)
    units = ties.classes()
    sizes = {len(unit) for unit in units}
    if len(sizes) != 1:
        raise ValueError("its channels are tied unevenly")
    members = []
    for path, side, indices in raw:
        of_unit = tuple(tuple(sorted(set().union(*(indices.get(i, set()) for i in unit)))) for unit in units)
        if side.startswith("layer "):
            more = layers[path].width_members(side.removeprefix("layer "), of_unit)
            if more is None:
                raise ValueError(f"the output of {path} is its heads")
            members += more
        else:
            members.append(Member(path, side, of_unit))
    return ChannelGroup(name, "channels", len(units), sizes.pop(), multiple, _merge(members))


def _is_input(graph, dep) -> bool:
    """Whether a handler that serves both sides of a module was meant for its input."""
    return graph.is_in_channel_pruning_fn(dep.handler) and not graph.is_out_channel_pruning_fn(dep.handler)


def _merge(members: list[Member]) -> list[Member]:
    """One member for each side of a module: a layer that is used twice is listed twice."""
    merged: dict[tuple[str, str], list[set[int]]] = {}
    for member in members:
        sets = merged.setdefault((member.path, member.side), [set() for _ in member.indices])
        for own, more in zip(sets, member.indices, strict=True):
            own.update(more)
    return [Member(p, s, tuple(tuple(sorted(i)) for i in sets)) for (p, s), sets in merged.items()]


def _tie_places(ties: "_Union", module: nn.Module, side: str, indices: dict[int, set[int]]) -> None:
    """The groups of a grouped convolution or normalisation must lose the same places."""
    if isinstance(module, nn.modules.conv._ConvNd):
        parts = module.groups if side != "both" else 1
    else:
        parts = module.num_groups if isinstance(module, nn.GroupNorm) else 1
    if parts == 1:
        return
    each = size_of(module, side) // parts
    first: dict[int, int] = {}
    for root_index, places in indices.items():
        for place in places:
            ties.join(first.setdefault(place % each, root_index), root_index)


class _Union:
    """Disjoint sets of the numbers below count."""

    def __init__(self, count: int):
        self._parent = list(range(count))

    def _find(self, i: int) -> int:
        while self._parent[i] != i:
            self._parent[i] = self._parent[self._parent[i]]
            i = self._parent[i]
        return i

    def join(self, i: int, j: int) -> None:
        i, j = sorted((self._find(i), self._find(j)))
        self._parent[j] = i

    def classes(self) -> list[list[int]]:
        sets: dict[int, list[int]] = {}
        for i in range(len(self._parent)):
            sets.setdefault(self._find(i), []).append(i)
        return list(sets.values())


def _try(group: ChannelGroup, model: nn.Module, example_inputs: Any, expected: list[list[int]]) -> str | None:
    """Why a group cannot be pruned, or None: about half of it is cut from a copy, which then runs."""
    if group.width < 2 * group.step:
        return f"it has {group.width} unit{'s' if group.width > 1 else ''} of {group.channels} channels"
    kept = max(group.step, group.width // 2 // group.step * group.step)
    try:
        cut = prune(model, [(group, list(range(kept, group.width)))])
        with evaluating(cut), torch.no_grad():
            shapes = describe_shapes(float_outputs(call_model(cut, example_inputs)))
    except Exception as error:
        return f"the model does not run without some of it ({type(error).__name__}: {str(error).splitlines()[0][:160]})"
    return None if shapes == expected else "its channels are the model's output"


def prune(model: nn.Module, removals: list[tuple[ChannelGroup, list[int]]]) -> nn.Module:
    """A copy of the model without these units of these groups."""
    lost: dict[tuple[str, str], set[int]] = {}
    for group, units in removals:
        gather(group.members, units, lost)
    cut = copy.deepcopy(model)
    take_out(cut, lost)
    return cut


def lowest(scores: Tensor, remove: int) -> list[int]:
    """The units with the smallest scores; of equal ones the last, so that the first are kept. NaN counts as largest."""
    scores = scores.nan_to_num(nan=math.inf, posinf=math.inf)
    order = torch.arange(len(scores) - 1, -1, -1)
    return sorted(order[scores.flip(0).argsort(stable=True)][:remove].tolist())
