"""Counts, means and second moments of what layers read, over folds of data: what compensation is fitted to."""

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from torch_sluice.compress.calling import call_model, evaluating, seeded

_MOST_ROWS = 16384  # samples of x taken from one batch
_GATHERED = 256  # rows, at least, that are multiplied at once
ROWS_FOR_UNKNOWN = 0.25  # independent ones, below which nothing is fitted


@functools.lru_cache(maxsize=8)
def _upper(channels: int) -> Tensor:
    """bool [channels, channels] The diagonal and what is above it."""
    return torch.ones(channels, channels, dtype=torch.bool).triu_()


def unpack(packed: Tensor, channels: int) -> Tensor:
    """float64 [channels, channels] The symmetric matrix of which ``packed`` is the upper triangle, row by row."""
    full = torch.zeros(channels, channels, dtype=torch.float64)
    full.masked_scatter_(_upper(channels), packed.double())
    return full + full.triu(1).T


def _rows_of(module: nn.Module, x: Tensor) -> Tensor:
    """[positions, channels] of an input with a batch dimension or without."""
    if not isinstance(module, nn.Linear):
        x = x.movedim(1 - module.weight.dim(), -1)  # the channels, in front of as many dimensions as the kernel has
    return x.reshape(-1, x.shape[-1])


class Moments:
    """Count, sums and second moments of the input channels of some layers of a model.

    ``product`` is symmetric: the upper half of it is kept alone, and whole ones are only made for a while. Rows are
    gathered until there are enough of them, since a half is picked out of a whole much slower than it is added to.

    Args:
        channels: of the layers. What is held from one call of the model to the next lies side by side: blocks that are
            allocated when they are needed, between what the model takes for a call, leave gaps that add up to more.
    """

    def __init__(self, channels: dict[str, int]) -> None:
        self.count: dict[str, int] = {}
        self.total: dict[str, Tensor] = {}
        self.product: dict[str, Tensor] = {}
        self.rows: dict[str, float] = {}  # independent ones that the counted rows are worth, where that is known
        self.refused: set[str] = set()  # layers for which part of the data has too few rows
        # What is never written to takes no memory.
        self._places = {path: torch.empty(count * (count + 1) // 2) for path, count in channels.items()}
        self._gathered = {path: torch.empty(_GATHERED, count) for path, count in channels.items()}
        self._waiting = dict.fromkeys(channels, 0)  # rows of these

    def add(self, path: str, rows: Tensor, most: int = _MOST_ROWS) -> None:
        """rows [samples, channels], of which about as many as ``most`` are taken. ``finish`` is to be called behind the
        last."""
        rows = rows[:: max(1, -(-len(rows) // most))].float()
        if not len(rows) or not rows.isfinite().all():
            return
        self.count[path] = self.count.get(path, 0) + len(rows)
        self.total[path] = self.total.get(path, 0) + rows.sum(0, dtype=torch.float64)
        if len(rows) >= _GATHERED:
            self._multiply(path, rows)
            return
        if self._waiting[path] + len(rows) > _GATHERED:
            self._multiply_waiting(path)
        begin = self._waiting[path]
        self._gathered[path][begin : begin + len(rows)] = rows
        self._waiting[path] += len(rows)

    def finish(self) -> None:
        for path in self.count:
            self._multiply_waiting(path)
        self._places, self._gathered = {}, {}

    def _multiply_waiting(self, path: str) -> None:
        if self._waiting[path]:
            self._multiply(path, self._gathered[path][: self._waiting[path]])
        self._waiting[path] = 0

    def _multiply(self, path: str, rows: Tensor) -> None:
        half = (rows.T @ rows)[_upper(rows.shape[1])]
        if path in self.product:
            self.product[path].add_(half)
        else:
            self.product[path] = self._places.pop(path).copy_(half)

    def share(self, path: str, other: str) -> None:
        """A layer reads the very inputs of another, whose moments serve both."""
        for own in (self.count, self.total, self.product, self.rows):
            if other in own:
                own[path] = own[other]
        if other in self.refused:
            self.refused.add(path)

    def forget_products(self, paths: Iterable[str]) -> None:
        """Of layers of which means alone are wanted."""
        for path in paths:
            self.product.pop(path, None)

    def drop(self, path: str) -> None:
        for own in (self.count, self.total, self.product):
            own.pop(path, None)

    def rows_for_unknown(self) -> float:
        """Independent rows for each channel of the layer that has fewest."""
        return min((rows / len(self.total[path]) for path, rows in self.rows.items()), default=math.inf)


class _Sums(dict[str, Tensor]):
    """path -> the sum of several folds' packed moments, made anew at each look: all would be as large as a fold."""

    def __init__(self, folds: Sequence[Moments]):
        super().__init__()
        self._folds = folds

    def __getitem__(self, path: str) -> Tensor:
        return sum(fold.product[path] for fold in self._folds)


def join(folds: Sequence[Moments]) -> Moments:
    """The moments of all of them, which are of different samples, with ``rows`` and ``refused``."""
    joint, known = Moments({}), {}
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
        if share * least < ROWS_FOR_UNKNOWN * len(joint.total[path]):
            joint.refused.add(path)
    return joint


class Part:
    """The moments of one layer's inputs over some folds, or over all folds but one."""

    def __init__(self, folds: "list[Moments]", path: str, left_out: "Moments | None" = None):
        self.count = sum(fold.count[path] for fold in folds)
        self.total = sum(fold.total[path] for fold in folds)
        self._folds, self._path, self._left_out = folds, path, left_out
        if left_out is not None:
            self.count = self.count - left_out.count[path]
            self.total = self.total - left_out.total[path]

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    def covariance(self, centred: bool = True) -> Tensor:
        """float64 [channels, channels]; not centred: second moments."""
        half = sum(fold.product[self._path] for fold in self._folds)
        if self._left_out is not None:
            half = half - self._left_out.product[self._path]
        product = unpack(half, len(self.total)) / self.count
        return product - self.mean[:, None] * self.mean if centred else product


def _independent_share(first: Part, second: Part) -> float:
    """Of the rows: of n independent rows, |C1 - C2|^2 of two halves is close to 4 / n of (tr C)^2 + tr C^2."""
    one, other = first.covariance(), second.covariance()
    mean = (one + other) / 2
    spread = float(mean.diagonal().sum()) ** 2 + float(mean.square().sum())
    difference = float((one - other).square().sum())
    return min(1.0, (1 / first.count + 1 / second.count) * spread / difference) if difference > 0 else 1.0


def count_moment_bytes(model: nn.Module, paths: list[str]) -> int:
    """What the moments of these layers take."""
    channels = [_channels(model, path) for path in paths]
    return sum(2 * count * (count + 1) for count in channels)


def _channels(model: nn.Module, path: str) -> int:
    return model.get_submodule(path).weight.shape[1]


class MomentRecorder:
    """Takes the moments of what layers read for as long as it is entered. Layers that read the same, such as those of
    queries, keys and values, share them.

    Args:
        calls: of the model that are to come.
        for_channel: rows for each channel of a layer that are enough: of more, some are taken of each call.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], calls: int, for_channel: float = math.inf):
        channels = {path: _channels(model, path) for path in paths}
        self._model, self._moments = model, Moments(channels)
        self._most = {
            path: int(min(_MOST_ROWS, max(_GATHERED, for_channel * count / max(1, calls))))
            for path, count in channels.items()
        }
        self._mates: dict[str, str] = {}  # layers that read what another does
        self._seen = WeakIdKeyDictionary()  # tensor -> {version: (number, the layer that read it first)}
        self._read: dict[str, list[int]] = {}  # numbers of the tensors that a layer read in one call of the model
        self._unlike: set[str] = set()
        self._hooks: list = []

    def __enter__(self) -> "MomentRecorder":
        for path in self._most:
            module = self._model.get_submodule(path)
            self._hooks.append(module.register_forward_pre_hook(self._record(path), with_kwargs=True))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def end_call(self) -> None:
        """To be called behind each call of the model."""
        read = self._read
        self._unlike |= {path for path, other in self._mates.items() if read.get(path) != read.get(other)}
        self._seen.clear(), read.clear()

    def finish(self) -> Moments:
        moments = self._moments
        moments.finish()
        for path, other in self._mates.items():
            if path in self._unlike:  # the same here and not there: rare, and then nothing is known
                moments.drop(path)
            elif other in moments.count:
                moments.share(path, other)
        return moments

    def _record(self, path: str):
        def hook(module, args, kwargs):
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor):
                return
            version = 0 if x.is_inference() else x._version
            number = sum(map(len, self._read.values()))
            number, first = self._seen.setdefault(x, {}).setdefault(version, (number, path))
            self._read.setdefault(path, []).append(number)
            if first == path or (path in self._moments.count and path not in self._mates):
                self._moments.add(path, _rows_of(module, x.detach()), self._most[path])
            else:
                self._mates.setdefault(path, first)

        return hook


def measure_moments(
    model: nn.Module, batches: Iterable[Any], paths: Sequence[str], for_channel: float = math.inf
) -> Moments:
    """Runs the model over the inputs of the batches and takes the moments of what these layers read."""
    batches = list(batches)
    with MomentRecorder(model, paths, len(batches), for_channel) as recorder, evaluating(model), torch.no_grad():
        for inputs in batches:
            with seeded():
                call_model(model, inputs)
            recorder.end_call()
    return recorder.finish()
