"""Makes the layers that read pruned channels go without them: what a removed channel would have brought is estimated
from those that stay, by least squares over the user's data, and folded into the weights. No training is needed.

For a layer y = W x + c with inputs of which the set r is removed and k is kept, with the mean m and the covariance C of
x over the data, x_r is close to m_r + A (x_k - m_k), A = C_rk (C_kk + lambda I)^-1, so that W_k becomes W_k + W_r A and
c becomes c + W_r (m_r - A m_k). A layer without c uses second moments instead of the covariance, and no mean.
A convolution does so at every tap; the channels at one position stand for x.

lambda is the mean variance times |k| / n, the unknowns for each independent row that C was taken from, times
s / (1 - s), where s is the share of x_r that cannot be told: what is best if all unknowns are alike. s is what a first
fit leaves, corrected by its degrees of freedom, or 1/2 with fewer than 1.5 rows for each unknown; with fewer than 1/4,
A is 0.
Positions of a sample are not independent rows: how many they are worth is measured, by how much C differs between two
halves of the data.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from torch_sluice.compress.calling import call_model, evaluating, seeded
from torch_sluice.compress.graph import ChannelGroup
from torch_sluice.compress.module_sizes import is_depthwise
from torch_sluice.compress.slicing import Lost, all_names

_MOST_CHANNELS = 4096  # whose moments, a square matrix, are kept
_MOST_ROWS = 16384  # samples of x taken from one batch
_RIDGE = 1e-3  # lambda is at least this, relative to the mean variance
_LOOKED_AT = 64  # removed channels of which a first fit tells how much of all can be told
_MOST_RIDGES = 12  # each ten times the one before
_FEWEST = 8  # independent rows for a mean
_ROWS_FOR_UNKNOWN = 0.25


class Moments:
    """Count, sums and second moments of the input channels of some layers of a model."""

    def __init__(self) -> None:
        self.count: dict[str, int] = {}
        self.total: dict[str, Tensor] = {}
        self.product: dict[str, Tensor] = {}
        self.rows: dict[str, float] = {}  # independent ones that the counted rows are worth, where that is known
        self.refused: set[str] = set()  # layers for which part of the data has too few rows

    def add(self, path: str, rows: Tensor) -> None:
        """rows [samples, channels]"""
        rows = rows[:: max(1, -(-len(rows) // _MOST_ROWS))].float()
        if not rows.isfinite().all():
            return
        self.count[path] = self.count.get(path, 0) + len(rows)
        self.total[path] = self.total.get(path, 0) + rows.sum(0, dtype=torch.float64)
        self.product[path] = self.product.get(path, 0) + rows.T @ rows

    def share(self, path: str, other: str) -> None:
        """A layer reads the very inputs of another, whose moments serve both."""
        for own in (self.count, self.total, self.product, self.rows):
            if other in own:
                own[path] = own[other]
        if other in self.refused:
            self.refused.add(path)

    def drop(self, path: str) -> None:
        for own in (self.count, self.total, self.product):
            own.pop(path, None)

    def rows_for_unknown(self) -> float:
        """Independent rows for each channel of the layer that has fewest."""
        return min((rows / len(self.total[path]) for path, rows in self.rows.items()), default=math.inf)


class _Sums(dict[str, Tensor]):
    """path -> the sum of several folds' second moments, made anew at each look: all would be as large as a fold."""

    def __init__(self, folds: Sequence[Moments]):
        super().__init__()
        self._folds = folds

    def __getitem__(self, path: str) -> Tensor:
        return sum(fold.product[path] for fold in self._folds)


def join(folds: Sequence[Moments]) -> Moments:
    """The moments of all of them, which are of different samples, with ``rows`` and ``refused``."""
    joint, known = Moments(), {}
    joint.product = _Sums(folds)
    for path in set.intersection(*(set(fold.count) for fold in folds)):
        inputs = tuple(id(fold.total[path]) for fold in folds)
        first = known.setdefault(inputs, path)
        if first != path:
            joint.share(path, first)
            continue
        joint.count[path] = sum(fold.count[path] for fold in folds)
        joint.total[path] = sum(fold.total[path] for fold in folds)
        if len(folds) == 1:
            continue
        share = _independent_share(*(Part(list(folds[half::2]), path) for half in (0, 1)))
        joint.rows[path] = share * joint.count[path]
        # Refused on any of the parts that candidates are fitted to, or what is measured on them would tell nothing
        # about what is fitted to all.
        least = joint.count[path] - max(fold.count[path] for fold in folds)
        if share * least < _ROWS_FOR_UNKNOWN * len(joint.total[path]):
            joint.refused.add(path)
    return joint


class Part:
    """The moments of one layer's inputs over some folds, or over all folds but one."""

    def __init__(self, folds: "list[Moments]", path: str, left_out: "Moments | None" = None):
        self.count = sum(fold.count[path] for fold in folds)
        self.total = sum(fold.total[path] for fold in folds)
        self.product = sum(fold.product[path] for fold in folds)
        if left_out is not None:
            self.count = self.count - left_out.count[path]
            self.total = self.total - left_out.total[path]
            self.product = self.product - left_out.product[path]

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    def covariance(self, centred: bool = True) -> Tensor:
        """float64 [channels, channels]; not centred: second moments."""
        product = self.product.double() / self.count
        return product - self.mean[:, None] * self.mean if centred else product


def _independent_share(first: Part, second: Part) -> float:
    """Of the rows: of n independent rows, |C1 - C2|^2 of two halves is close to 4 / n of (tr C)^2 + tr C^2."""
    one, other = first.covariance(), second.covariance()
    mean = (one + other) / 2
    spread = float(mean.diagonal().sum()) ** 2 + float(mean.square().sum())
    difference = float((one - other).square().sum())
    return min(1.0, (1 / first.count + 1 / second.count) * spread / difference) if difference > 0 else 1.0


def reading_layers(model: nn.Module, groups: Iterable[ChannelGroup]) -> list[str]:
    """The layers that read a group's channels and can be compensated: not those whose weight others use, too."""
    shared = _shared_weights(model)
    paths = {reading_layer((member.name, member.dim)) for group in groups for member in group.members} - {None}
    return sorted(path for path in paths - shared if _is_compensable(model.get_submodule(path)))


def reading_layer(side: tuple[str, int]) -> str | None:
    """The layer whose inputs a dimension of a parameter counts, if it is a linear layer or a convolution."""
    path, _, leaf = side[0].rpartition(".")
    return path if leaf == "weight" and side[1] == 1 else None


def _shared_weights(model: nn.Module) -> set[str]:
    return {name.rpartition(".")[0] for names in all_names(model).values() if len(names) > 1 for name in names}


def _is_compensable(module: nn.Module) -> bool:
    if "weight" not in module._parameters:  # it is computed from others
        return False
    if isinstance(module, nn.Linear):
        return module.in_features <= _MOST_CHANNELS
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1 and module.in_channels <= _MOST_CHANNELS and not is_depthwise(module)
    return False


def _rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """[positions, channels] of an input with a batch dimension or without."""
    if not isinstance(module, nn.Linear):
        x = x.movedim(1 - module.weight.dim(), -1)  # the channels, in front of as many dimensions as the kernel has
    return x.reshape(-1, x.shape[-1])


def count_moment_bytes(model: nn.Module, paths: list[str]) -> int:
    """What the moments of these layers take."""
    return sum(4 * model.get_submodule(path).weight.shape[1] ** 2 for path in paths)


def measure_moments(
    model: nn.Module, batches: Iterable[Any], paths: list[str], report: Callable[[str], None] = lambda text: None
) -> Moments:
    """Runs the model over the inputs of the batches and takes the moments of what these layers read. Layers that read
    the same, such as those of queries, keys and values, share them."""
    moments, hooks = Moments(), []
    mates: dict[str, str] = {}  # layers that read what another does
    seen = WeakIdKeyDictionary()  # tensor -> {version: (number, the layer that read it first)}
    read: dict[str, list[int]] = {}  # numbers of the tensors that a layer read in one call of the model

    def record(path: str):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor):
                return
            version = 0 if x.is_inference() else x._version
            number, first = seen.setdefault(x, {}).setdefault(version, (sum(map(len, read.values())), path))
            read.setdefault(path, []).append(number)
            if first == path or (path in moments.count and path not in mates):
                moments.add(path, _rows_of(module, x.detach()))
            else:
                mates.setdefault(path, first)

        return hook

    unlike: set[str] = set()
    try:
        for path in paths:
            hooks.append(model.get_submodule(path).register_forward_pre_hook(record(path), with_kwargs=True))
        with evaluating(model), torch.no_grad():
            for inputs in batches:
                report("activations")
                with seeded():
                    call_model(model, inputs)
                unlike |= {path for path, other in mates.items() if read.get(path) != read.get(other)}
                seen.clear(), read.clear()
    finally:
        for hook in hooks:
            hook.remove()
    for path, other in mates.items():
        if path in unlike:  # the same here and not there: rare, and then nothing is known
            moments.drop(path)
        elif other in moments.count:
            moments.share(path, other)
    return moments


@dataclass
class Update:
    """What is added to the weight and the bias of a layer that has lost inputs."""

    path: str
    weight: Tensor | None
    bias: Tensor | None

    @torch.no_grad()
    def add_to(self, pruned: nn.Module) -> Callable[[], None]:
        """Puts new parameters in place of the layer's. Returns what puts the old ones back."""
        module, before = pruned.get_submodule(self.path), {}
        for name, change in (("weight", self.weight), ("bias", self.bias)):
            if change is not None:
                before[name] = old = getattr(module, name)
                setattr(module, name, nn.Parameter(old + change.to(old), requires_grad=old.requires_grad))

        def undo() -> None:
            for name, old in before.items():
                setattr(module, name, old)

        return undo


@torch.no_grad()
def find_updates(
    original: nn.Module,
    lost: Lost,
    moments: Moments,
    left_out: Moments | None = None,
) -> list[Update]:
    """What makes up for inputs that layers lose. ``lost`` counts in channels of ``original``, which stays as it is.
    ``left_out``: the part of the moments that must not be used."""
    updates = []
    for (name, dim), indices in lost.items():
        path = reading_layer((name, dim))
        if path is None or not indices or path not in moments.count:
            continue
        part = Part([moments], path, left_out)
        rows = moments.rows.get(path, moments.count[path]) * part.count / moments.count[path]
        if rows < _FEWEST:
            continue
        source = original.get_submodule(path)
        channels = source.weight.shape[1]
        kept = torch.tensor([i for i in range(channels) if i not in indices])
        gone = torch.tensor(sorted(indices))
        centred = source.bias is not None
        weight = source.weight.detach().cpu().double()[_kept_rows(source, lost.get((name, 0), set()))][:, gone]
        change = shift = None
        # All channels count, so that a group is treated alike at all its sizes.
        if path not in moments.refused and rows >= _ROWS_FOR_UNKNOWN * channels:
            change = _make_up(part, rows, kept, gone, weight, centred)
        if centred:
            shift = _over_taps(weight) @ part.mean[gone]
            if change is not None:
                shift -= _over_taps(change) @ part.mean[kept]
        updates.append(Update(path, change, shift))
    return updates


def _over_taps(weight: Tensor) -> Tensor:
    return weight.flatten(2).sum(2) if weight.dim() > 2 else weight


def _make_up(part: Part, rows: float, kept: Tensor, gone: Tensor, weight: Tensor, centred: bool) -> Tensor:
    """W_r A, float64 [outputs, kept, taps ..]. ``weight``: W_r."""
    moment = part.covariance(centred)
    inner, outer, unknowns = moment[kept][:, kept], moment[kept][:, gone], len(kept)
    scale = inner.diagonal().mean().clamp_min(1e-30)
    untold = 0.5
    if rows > 1.5 * unknowns:  # else the fit leaves next to nothing, whatever is true
        some = slice(None, None, max(1, len(gone) // _LOOKED_AT))
        variance = moment.diagonal()[gone[some]].sum().clamp_min(1e-30)
        told = (_solve(inner, outer[:, some], _RIDGE * scale) * outer[:, some]).sum() / variance
        untold = min(max(float(1 - told) * rows / (rows - unknowns), 0.0), 0.9)
    ridge = max(_RIDGE, unknowns / rows * untold / (1 - untold)) * scale
    # [outputs and taps, gone]: of A and of W_r A, that is solved for which has fewer columns.
    wanted = weight.movedim(1, -1)
    flat = wanted.reshape(-1, len(gone))
    if len(flat) < len(gone):
        change = _solve(inner, outer @ flat.T, ridge).T
    else:
        change = flat @ _solve(inner, outer, ridge).T
    return change.reshape(*wanted.shape[:-1], len(kept)).movedim(-1, 1)


def _solve(inner: Tensor, outer: Tensor, ridge: Tensor) -> Tensor:
    """(inner + ridge I)^-1 outer, for a symmetric inner that is positive but for rounding: sums of squares of channels
    far from 0 cancel in a covariance. Where that shows, the ridge grows beyond it."""
    inner = inner.clone()
    inner.diagonal().add_(ridge)
    for _ in range(_MOST_RIDGES):
        factor, failed = torch.linalg.cholesky_ex(inner)
        if not failed:
            return torch.cholesky_solve(outer, factor)
        inner.diagonal().add_(9 * ridge)
        ridge = 10 * ridge
    return torch.zeros_like(outer)


def compensate(pruned: nn.Module, original: nn.Module, lost: dict[tuple[str, str], set[int]], moments: Moments) -> None:
    """Changes the weights of layers of ``pruned`` that lost inputs. ``lost`` counts in channels of ``original``."""
    for update in find_updates(original, lost, moments):
        update.add_to(pruned)


def _kept_rows(source: nn.Module, lost: set[int]) -> Tensor:
    return torch.tensor([i for i in range(source.weight.shape[0]) if i not in lost])
