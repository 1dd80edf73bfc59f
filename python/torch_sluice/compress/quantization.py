"""Which weights are quantised: those whose layers become faster on this machine, or as fast and smaller, as far as the
metric allows. A weight is found by how it is used when the model runs, whatever the class of its layer."""

import contextlib
import copy
import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from torch_sluice.compress.calling import call_model, evaluating
from torch_sluice.compress.layers import forgo_fast_paths, quantized_weights
from torch_sluice.compress.progress import Progress
from torch_sluice.compress.quantized import QuantizedWeight
from torch_sluice.compress.report import LayerDecision
from torch_sluice.compress.uses import Use, float_parameters, watch_uses

SMALLEST = 1 << 16  # elements of a table that is worth it for its bytes
_GAIN = 1.1  # a layer that becomes so many times faster is quantised for its time
_BYTES = 0.005  # of the model's: what a weight has to win that is quantised for its bytes
_LOSS = 0.02  # of a call's time, which all that is quantised for its bytes may take longer
TURNS = 3  # of timing
_CALLS = 5  # in a turn


@dataclass
class Candidate:
    """A weight, what it would become, and what that wins."""

    name: str  # of the layer whose ``weight`` it is, or else of the parameter
    weight: QuantizedWeight
    places: list[str]  # names of the parameters that it is: several where it is tied
    before: float = 0.0  # seconds in a call of the model on the example
    after: float = 0.0
    bytes: int = 0  # won
    members: list["Candidate"] = field(default_factory=list)  # that are quantised with it: an LSTM's other matrices

    def all(self) -> list["Candidate"]:
        return [self, *self.members]

    finer: float | None = None  # seconds with finer activations, where that was timed (widths.py)

    @property
    def is_looked_up(self) -> bool:
        """Whether nothing else reads it, a share of the time that nobody notices: it is quantised for its bytes."""
        return self.weight.kind == "rows"

    @property
    def is_faster(self) -> bool:
        """Whether it is quantised for its time, and not for its bytes alone."""
        return self.before > _GAIN * self.after


def layer_name(parameter: str) -> str:
    """The name by which a report calls a parameter."""
    return parameter.removesuffix(".weight") or parameter


def find_candidates(
    model: nn.Module, example_inputs: Any, options: dict, progress: Progress
) -> tuple[list[Candidate], list[LayerDecision]]:
    """The weights that are better quantised, timed within calls of the whole model; and why others stay.

    The model is as before when it returns. Whatever goes wrong with a candidate, it stays in floating point.
    """
    parameters = float_parameters(model)
    stay = [
        LayerDecision(layer_name(name), "float", "its weight is quantised already")
        for name, _ in quantized_weights(model)
    ]
    with evaluating(model), torch.no_grad():
        uses = watch_uses(model, lambda: call_model(model, example_inputs), list(parameters))
    possible: list[Candidate] = []
    progress.start("packing", len(parameters))
    for name, places in parameters.items():
        progress.step(name)
        parameter, use = model.get_parameter(name), uses.get(name)
        reason = _why_not(parameter, use)
        if reason is None:
            try:
                weight = _quantize(parameter, use, options)
            except Exception as error:
                reason = _first_line(error)
            else:
                won = parameter.nbytes - weight.nbytes
                possible.append(Candidate(layer_name(name), weight, places, bytes=won))
                continue
        if use is not None or _is_known_layer(model, name):
            stay.append(LayerDecision(layer_name(name), "float", reason))
    possible, apart = _join(model, possible, uses)
    stay += apart
    possible, failed = _try_all(model, possible, example_inputs)
    stay += failed
    timed = [candidate for candidate in possible if not candidate.is_looked_up]
    call = 0.0
    try:
        call = _time_in_place(model, timed, example_inputs, progress)
    except Exception as error:
        reason = f"it could not be timed: {_first_line(error)}"
        stay += [LayerDecision(candidate.name, "float", reason) for candidate in timed]
        possible = [candidate for candidate in possible if candidate.is_looked_up]
    size = sum(model.get_parameter(name).nbytes for name in parameters)
    chosen, slower = _choose(possible, call, size)
    for c in slower:
        reason = f"it is not {_GAIN:g} times faster quantised: {c.before * 1e6:.0f} -> {c.after * 1e6:.0f} µs"
        stay.append(LayerDecision(c.name, "float", reason))
    return chosen, stay


def _choose(candidates: list[Candidate], call: float, size: int) -> tuple[list[Candidate], list[Candidate]]:
    """Those that are better quantised, and those that are not.

    Better are those that become faster, and of the others those that win bytes, the cheapest first, as long as a call
    takes next to no longer: what a small layer loses or wins is as little as one call's time is from the next.

    Args:
        call: seconds of a call of the model.
        size: bytes of the model's weights.
    """
    good = [c for c in candidates if c.is_looked_up or c.is_faster]
    rest = [c for c in candidates if not (c.is_looked_up or c.is_faster)]
    left = _LOSS * call
    for c in sorted(rest, key=lambda c: (c.after - c.before) / max(c.bytes, 1)):
        lost = c.after - c.before
        if c.bytes >= _BYTES * size and lost <= left:
            left -= max(lost, 0.0)
            good.append(c)
    names = {c.name for c in good}
    return [c for c in candidates if c.name in names], [c for c in rest if c.name not in names]


def _join(
    model: nn.Module, candidates: list[Candidate], uses: dict[str, Use]
) -> tuple[list[Candidate], list[LayerDecision]]:
    """Makes one candidate of those that a kernel takes together, and leaves out those whose fellows are none."""
    by_name = {candidate.places[0]: candidate for candidate in candidates}
    joined, stay, seen = [], [], set()
    for name, candidate in by_name.items():
        together = uses[name].together
        if not together:
            joined.append(candidate)
        elif name in seen:
            continue
        elif not together <= by_name.keys():
            stay.append(LayerDecision(candidate.name, "float", "another weight of its layer stays"))
        else:
            seen |= together
            owner = name.rpartition(".")[0]
            members = [by_name[other] for other in by_name if other in together and other != name]
            won = candidate.bytes + sum(member.bytes for member in members)
            joined.append(replace(candidate, name=owner or candidate.name, bytes=won, members=members))
    return joined, stay


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def _is_known_layer(model: nn.Module, name: str) -> bool:
    owner = model.get_submodule(name.rpartition(".")[0])
    layers = (
        nn.Linear,
        nn.Bilinear,
        nn.modules.conv._ConvNd,
        nn.Embedding,
        nn.EmbeddingBag,
        nn.RNNBase,
        nn.RNNCellBase,
    )
    return isinstance(owner, layers)


def _why_not(parameter: nn.Parameter, use: Use | None) -> str | None:
    if use is None:
        return "it is not called for example_inputs by itself"
    if parameter.device.type != "cpu":
        return f"its weight is on {parameter.device}: the integer kernels are for the CPU"
    if type(parameter) is not nn.Parameter:
        return f"its weight is a {type(parameter).__name__}"
    if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"its weight is {str(parameter.dtype).removeprefix('torch.')}"
    if not parameter.isfinite().all():
        return "its weight has NaN or infinity"
    if use.others:
        return f"its weight is used by {', '.join(sorted(use.others))}, which no integer kernel serves"
    kinds = use.kinds - {"rows"} if use.kinds == {"rows", "linear"} else use.kinds
    if len(kinds) != 1 or not kinds <= {"linear", "transposed", "conv2d", "rows"}:
        return f"its weight is used in several ways: {', '.join(sorted(use.kinds))}"
    if kinds == {"rows"} and parameter.numel() < SMALLEST:
        return "its table is small"
    if kinds == {"conv2d"} and use.groups > 1 and parameter.shape[1] == 1:
        return "it is depth-wise: a product of few numbers each"
    return None


def _quantize(parameter: nn.Parameter, use: Use, options: dict) -> QuantizedWeight:
    kind = "linear" if use.kinds == {"rows", "linear"} else next(iter(use.kinds))
    options = dict(options)
    if kind == "rows":
        del options["weight_bits"], options["group_size"]
    return QuantizedWeight.from_float(parameter, kind, groups=use.groups if kind == "conv2d" else 1, **options)


def repacked(model: nn.Module, candidate: Candidate, options: dict) -> Candidate:
    """The candidate with the weight that the model has now, as where it was compensated by other data."""
    if candidate.members:
        members = [repacked(model, member, options) for member in candidate.members]
        return replace(repacked(model, replace(candidate, members=[]), options), members=members)
    kind, former = candidate.weight.kind, candidate.weight.options
    options = {k: v for k, v in options.items() if kind != "rows" or k not in ("weight_bits", "group_size")}
    weight = QuantizedWeight.from_float(model.get_parameter(candidate.places[0]), kind, groups=former.groups, **options)
    return replace(candidate, weight=weight)


@contextlib.contextmanager
def placed(model: nn.Module, candidates: list[Candidate]) -> Iterator[nn.Module]:
    """The model with these weights quantised, in place: no second copy of it is made. Afterwards it is as before."""
    undo = []
    try:
        for candidate in (member for whole in candidates for member in whole.all()):
            weight = nn.Parameter(candidate.weight, requires_grad=False)
            for place in candidate.places:
                owner, _, leaf = place.rpartition(".")
                module = model.get_submodule(owner)
                undo.append((module, leaf, module._parameters[leaf]))
                setattr(module, leaf, weight)
        undo += forgo_fast_paths(model)
        yield model
    finally:
        for module, name, former in reversed(undo):
            setattr(module, name, former)


def _try_all(
    model: nn.Module, candidates: list[Candidate], example_inputs: Any
) -> tuple[list[Candidate], list[LayerDecision]]:
    """Runs the model on the example with all of them, and if that fails with each alone; those that fail stay."""

    def failure(some: list[Candidate]) -> Exception | None:
        try:
            with placed(model, some), evaluating(model), torch.inference_mode():
                call_model(model, example_inputs)
        except Exception as error:
            return error
        return None

    if not candidates or failure(candidates) is None:
        return candidates, []
    good, stay = [], []
    for candidate in candidates:
        error = failure([candidate])
        if error is None:
            good.append(candidate)
        else:
            stay.append(LayerDecision(candidate.name, "float", f"quantised it fails: {_first_line(error)}"))
    error = failure(good)
    if error is None:
        return good, stay
    reason = f"quantised with others it fails: {_first_line(error)}"
    return [], stay + [LayerDecision(candidate.name, "float", reason) for candidate in good]


def _time_in_place(model: nn.Module, candidates: list[Candidate], example_inputs: Any, progress: Progress) -> float:
    """Measures ``before`` and ``after`` of all candidates within calls of the model, all of them quantised or none.
    Returns the seconds of a call with none.

    In place, since weights that a loop over one layer would find in a cache come from memory in a call of the model,
    four times as many of them in float32. The best of several turns: what another process does meets some of them.
    """
    if not candidates:
        return 0.0
    call = math.inf
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    progress.start("timing", TURNS)
    for _ in range(TURNS):
        progress.step("layers")
        for some, seconds in (([], before), (candidates, after)):
            time_turn(model, some, candidates, example_inputs, seconds)
        call = min(call, _time_call(model, example_inputs))
    for candidate in candidates:
        candidate.before, candidate.after = before[candidate.places[0]], after[candidate.places[0]]
    return call


def _time_call(model: nn.Module, example_inputs: Any) -> float:
    """Seconds of the faster of two calls."""
    with evaluating(model), torch.inference_mode():
        moments = [time.perf_counter()]
        for _ in range(2):
            call_model(model, example_inputs)
            moments.append(time.perf_counter())
    return min(end - start for start, end in itertools.pairwise(moments))


def time_turn(
    model: nn.Module, some: list[Candidate], watched: list[Candidate], example_inputs: Any, seconds: dict[str, float]
) -> None:
    """Least seconds of the watched weights in a few calls of the model with some of them quantised, by name."""
    names = [candidate.places[0] for candidate in watched]
    with placed(model, some), evaluating(model), torch.inference_mode():
        call_model(model, example_inputs)
        for _ in range(_CALLS):
            for name, use in watch_uses(model, lambda: call_model(model, example_inputs), names).items():
                seconds[name] = min(use.seconds, seconds.get(name, math.inf))


def apply(model: nn.Module, candidates: list[Candidate]) -> nn.Module:
    """A copy of the model with these weights quantised, none of whose parameters asks for a gradient. They lie in the
    memory of the candidates."""
    # What deepcopy believes to have copied already it takes as it is: the floating-point weights are not copied.
    memo: dict[int, Any] = {}
    for member in (member for whole in candidates for member in whole.all()):
        place = member.places[0]
        memo[id(model.get_parameter(place))] = nn.Parameter(member.weight.twin(), requires_grad=False)
    quantized = copy.deepcopy(model, memo)
    if candidates:
        quantized.requires_grad_(False)
        forgo_fast_paths(quantized)
    return quantized
