"""``torch_sluice.plan``: searches the layouts of a cluster, and says what it found and why."""

from dataclasses import dataclass

from torch_sluice.plan.device import load_cluster
from torch_sluice.plan.model import describe_model
from torch_sluice.plan.search import DEFAULT_SPACE, Found, search
from torch_sluice.plan.shapes import Cluster, Estimate, Layout, ModelShape, names_of

_AXES = ("tp", "pp", "cp", "dp", "vpp", "micro_batch")
_DECIDED = (*_AXES, "recompute", "zero")
_SECONDS = {
    "compute": "operators",
    "recompute": "operators that run again",
    "tp": "tensor-parallel traffic",
    "cp": "context-parallel traffic",
    "pp": "pipeline traffic",
    "bubble": "pipeline bubble",
    "spread": "slowest rank",
    "dp": "data-parallel traffic",
    "optimizer": "optimizer",
}
_BYTES = {
    "weight": "weights",
    "gradient": "gradients",
    "state": "optimizer state",
    "activation": "activations",
    "temporary": "temporaries",
    "margin": "margin",
}


@dataclass(frozen=True)
class Plan:
    """The fastest layout that fits, its cost, and what it was chosen from.

    ``others``: the next best layouts with their costs. ``reasons``: for each axis, the best layout with another value
    of it, or what that other value needs where it doesn't fit.
    """

    model: ModelShape
    cluster: Cluster
    layout: Layout
    estimate: Estimate
    others: tuple[tuple[Layout, Estimate], ...]
    reasons: tuple[str, ...]
    predicted: int

    @property
    def mesh(self) -> str:
        """What ``torch-sluice train --mesh`` takes."""
        return f"dp={self.layout.dp},tp={self.layout.tp},pp={self.layout.pp}"

    @property
    def command(self) -> str:
        """The command for every host; HOST stands for the first one's name."""
        nodes = -(-self.layout.gpus // self.cluster.gpus_per_node)
        local = min(self.layout.gpus, self.cluster.gpus_per_node)
        where = f"--nnodes {nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 " if nodes > 1 else ""
        schedule = f" --schedule {self.layout.schedule}" if self.layout.pp > 1 else ""
        sharded = " --data-parallel fsdp" if self.layout.zero == 3 and self.layout.dp > 1 else ""
        train = f"torch_sluice.cli train --mesh {self.mesh}{schedule}{sharded}"
        return f"torchrun {where}--nproc-per-node {local} -m {train}"

    def explain(self) -> str:
        """The plan as text for people."""
        return "\n".join(_explain(self))


def plan(
    model,
    cluster="h100-80g",
    *,
    gpus: int,
    global_batch: int,
    space: dict | None = None,
    layout: dict | None = None,
    **model_changes,
) -> Plan:
    """The fastest layout of ``gpus`` GPUs for a training step of ``global_batch`` sequences that fits into memory.

    ``model``: a transformers config or model, a mapping of plain numbers, or a ModelShape; ``model_changes`` replace
    members of its shape, such as ``sequence=4096``. ``cluster``: a known device, a TOML file or a Cluster. ``space``
    narrows or widens what is searched: name to ``(least, most)``, of dp, tp, pp, cp, vpp, micro_batch, recompute (0
    none, 1 selective, 2 full) and zero; by default tp stays within a host and cp is 1. ``layout``: options that aren't
    searched, by name, such as ``precision="fp8"``. Raises ValueError for what can't be, and MemoryError, which says
    what needs least and what would fit, for a model that fits nowhere.
    """
    shape, described = describe_model(model, **model_changes), load_cluster(cluster)
    unknown = set(layout or ()) - (set(names_of(Layout)) - set(_DECIDED) - {"gpus", "global_batch"})
    if unknown:
        raise ValueError(f"layout has {', '.join(sorted(unknown))}, expected an option that isn't searched")
    base = Layout(gpus, global_batch, **(layout or {}))
    ranges = {"tp": (1, described.gpus_per_node)} | (space or {})
    found = search(shape, described, base, ranges, capacity=16)
    if not found.candidates:
        raise MemoryError(_what_is_missing(found, described))
    (best, estimate), *others = found.candidates
    if base.fused_attention:  # which has nothing for selective recomputation to save: the same plan twice
        others = [other for other in others if other[0].recompute != "selective"]
    reasons = _reasons(shape, described, base, DEFAULT_SPACE | ranges, best, estimate)
    return Plan(shape, described, best, estimate, tuple(others[:8]), tuple(reasons), found.predicted)


def describe_cut(layout: Layout) -> str:
    """One line of what was decided."""
    values = {name: getattr(layout, name) for name in _DECIDED}
    sizes = " ".join(f"{name} {values[name]}" for name in ("tp", "pp", "cp", "dp", "vpp") if values[name] > 1)
    kept = {"none": "no recomputation"}.get(layout.recompute, f"{layout.recompute} recomputation")
    return f"{sizes or 'one GPU'}, micro-batch {layout.micro_batch}, {layout.schedule}, {kept}, ZeRO {layout.zero}"


def _what_is_missing(found: Found, cluster: Cluster) -> str:
    layout, estimate = found.smallest
    needed, there = estimate.total_bytes / 1e9, cluster.memory_bytes / 1e9
    return (
        f"the model fits nowhere: of {layout.gpus} GPUs with {there:.1f} GB each, the leanest layout "
        f"({describe_cut(layout)}) needs {needed:.1f} GB on one: {_memory(estimate)}. Expected more GPUs, GPUs with "
        f"{needed:.0f} GB, a smaller model or sequence, or a wider space"
    )


def _memory(estimate):
    parts = {name: getattr(estimate, f"{name}_bytes") / 1e9 for name in _BYTES}
    return ", ".join(f"{_BYTES[name]} {size:.1f}" for name, size in parts.items() if size >= 0.05)


def _reasons(shape, cluster, base, ranges, best, estimate):
    for axis in _AXES:
        value = getattr(best, axis)
        below, above = (ranges[axis][0], value - 1), (value + 1, ranges[axis][1])
        answers = [
            _best_within(shape, cluster, base, ranges | {axis: part}) for part in (below, above) if part[0] <= part[1]
        ]
        fitting = [answer for found in answers if found for answer in found.candidates]
        if fitting:
            layout, other = min(fitting, key=lambda candidate: candidate[1].step_s)
            slower = 100 * (other.step_s / estimate.step_s - 1)
            better = f"{axis} {value}: the best with another, {axis} {getattr(layout, axis)}, takes {slower:+.1f} %"
            yield f"{better} ({_loss(estimate, other)})"
        elif any(answers):
            leanest = min(found.smallest[1].total_bytes for found in answers if found)
            yield f"{axis} {value}: no other fits, the leanest needs {leanest / 1e9:.1f} GB"


def _best_within(shape, cluster, base, ranges):
    try:
        return search(shape, cluster, base, ranges, capacity=1)
    except ValueError:  # no layout of that part
        return None


def _loss(best, other):
    """What the other layout spends more on, most of all."""
    more = {name: getattr(other, f"{name}_s") - getattr(best, f"{name}_s") for name in _SECONDS}
    name = max(more, key=more.get)
    return f"{_SECONDS[name]} {getattr(other, f'{name}_s'):.3g} s instead of {getattr(best, f'{name}_s'):.3g} s"


def _explain(plan):
    layout, estimate = plan.layout, plan.estimate
    yield f"{describe_cut(layout)}: {estimate.step_s:.4g} s a step, {100 * estimate.mfu:.1f} % of the peak"
    parts = {name: getattr(estimate, f"{name}_s") for name in _SECONDS}
    shares = (f"{_SECONDS[name]} {100 * part / estimate.step_s:.1f} %" for name, part in parts.items() if part > 0)
    yield f"time: {', '.join(shares)}"
    yield f"memory: {estimate.total_bytes / 1e9:.1f} of {plan.cluster.memory_bytes / 1e9:.1f} GB: {_memory(estimate)}"
    yield from plan.reasons
    for other, cost in plan.others[:3]:
        yield f"next: {describe_cut(other)}: {cost.step_s:.4g} s, {cost.total_bytes / 1e9:.1f} GB"
    if layout.cp == 1:
        yield f"start: {plan.command}"
    else:
        yield "start: a loop of your own, since torch-sluice train has no context parallel; the mesh is "
        yield f"       {plan.mesh},cp={layout.cp}"
