"""How far a model is pruned: the stages that keep enough of the metric, each smaller than the one before."""

import math
from typing import TYPE_CHECKING

from torch_sluice.compress.candidates import Stage
from torch_sluice.compress.estimate import Score
from torch_sluice.compress.graph import ChannelGroup
from torch_sluice.compress.pruning import Plan, choose_by_quantile
from torch_sluice.compress.recording import keeping_recordings
from torch_sluice.compress.report import LayerDecision
from torch_sluice.compress.sensitivity import FRACTIONS, Curves, Sensitivity, choose_longest, order_moves, predict_cost

if TYPE_CHECKING:
    from torch_sluice.compress.run import Run

SLACK = 1e-9  # of shares, for rounding


@keeping_recordings()
def find_stages(run: "Run", floor: float) -> tuple[list[Stage], list[Sensitivity], Score]:
    """The stages of pruning, each within ``floor``, the first being the original; what sensitivity showed; and the
    last stage's score."""
    settings, pruner, progress = run.settings, run.pruner, run.progress
    accepted: list[tuple[Plan, Score]] = []

    def measure(kept: Plan) -> float:
        progress.step(f"{len(kept)} groups")
        score = run.score(Stage(kept), run.beside, floor, hurry=True)
        if score.low < floor - SLACK:
            return score.low
        wrong = pruner.why_wrong(kept, run.example)  # groups were proved by some of their units, not by these
        if wrong is not None:
            run.failures[wrong] += 1
            return -math.inf
        accepted.append((kept, score))
        return score.low

    now, total = run.call_seconds, pruner.predict_seconds({})

    def enough(kept: Plan) -> bool:
        return settings.budget is not None and now - total + pruner.predict_seconds(kept) <= settings.budget

    curves: list[Sensitivity] = []
    if settings.budget is not None and now <= settings.budget:
        run.notes.append(f"the model meets the budget of {settings.budget * 1e3:.2f} ms unpruned")
        chosen: Plan = {}
    elif settings.policy == "quantile":
        progress.start("pruning", 5)
        chosen = choose_by_quantile(pruner, lambda kept: measure(kept) >= floor - SLACK, settings.round_to)
    else:
        # Where closeness is the metric, what is far below the floor is of no use; a metric of the user's may not
        # mind that outputs move.
        most = 3 * (1 - floor) + SLACK if run.measure.fidelity and settings.finetune is None else 1.0
        search = Curves(pruner, run.measure, most, settings.round_to, progress)
        curves = search.curves
        if settings.finetune is None:
            progress.foresee("sensitivity of", len(curves) * run.loss_seconds / 2)
            progress.foresee("pruning", 2 * run.score_seconds + len(curves) * run.loss_seconds / 2)
            search.measure_first()
        else:  # training comes to all sizes
            choices = sum(len(g.kept_choices(FRACTIONS, settings.round_to)) for g in pruner.groups)
            progress.foresee("sensitivity of", 0.7 * choices * run.loss_seconds)
            search.measure_all()
        progress.start("pruning", None)
        chosen = choose_longest(
            order_moves(pruner, curves, search.further), len(curves), measure, floor - SLACK, enough,
            lambda kept: predict_cost(curves, kept), lambda kept: total - pruner.predict_seconds(kept),
        )  # fmt: skip
        run.evaluations += search.evaluations
    plans = [(kept, score) for kept, score in accepted if _within(kept, chosen, pruner.groups)]
    plans.sort(key=lambda plan: -pruner.predict_seconds(plan[0]))
    stages, score = [Stage({})], Score(1.0, 1.0, run.measure.samples)
    if plans:
        stages, score = stages + [Stage(kept) for kept, _ in plans], plans[-1][1]
        if run.beside is not None:
            score = Score(0.0, 0.0)  # of no sample: what it keeps without them is not known
    if settings.finetune is not None and curves:
        further, last = _train_further(run, curves, stages[-1], floor, enough)
        stages, score = stages + further, last or score
    return stages, curves, score


def _train_further(run: "Run", curves, start: Stage, floor: float, enough) -> tuple[list[Stage], Score | None]:
    """Rounds that each prune about a sixth of the predicted time further and train; one that stays below ``floor``
    is undone and tried at half the size."""
    pruner, settings = run.pruner, run.settings
    plans = [plan for plan in order_moves(pruner, curves) if _within(start.kept, plan, pruner.groups)]
    total, stages, stage, part, last = pruner.predict_seconds({}), [], start, 1 / 6, None
    run.progress.start("fine-tuning", None)
    while not enough(stage.kept) and part > 0.05:
        goal = pruner.predict_seconds(stage.kept) - part * total
        following = [plan for plan in plans if _within(stage.kept, plan, pruner.groups) and plan != stage.kept]
        if not following:
            break
        plan = next((plan for plan in following if pruner.predict_seconds(plan) <= goal), following[-1])
        candidate = pruner.build_further(run.workshop.build(stage), stage.kept, plan).train()
        for step in range(settings.finetune_steps):
            run.progress.step(f"{len(plan)} groups, step {step + 1}")
            settings.finetune(candidate, step)
        further = Stage(plan, candidate.eval())
        score = run.score(further, None, floor)
        if score.low >= floor - SLACK:
            stage, last = further, score
            stages.append(stage)
        else:
            part /= 2
    return stages, last


def describe_pruning(run: "Run", chosen: Plan, curves: dict[int, Sensitivity]) -> None:
    pruner = run.pruner
    base = pruner.predict_seconds({})
    for g, group in enumerate(pruner.groups):
        kept = chosen.get(g)
        size = group.channels if group.kind == "channels" else 1
        curve = curves.get(g)
        if kept is not None:
            cost = curve.losses[curve.kept.index(kept)] if curve and kept in curve.kept else None
            saved = base - pruner.predict_seconds({g: kept})
            time = f"{saved * 1e3:.2f} ms" if saved >= 1e-4 else f"{saved * 1e6:.1f} µs"
            reason = f"predicted to save {time}"
            if cost is not None:
                reason += f", alone moves the outputs by {cost:.2%}"
            decision = LayerDecision(group.name, "pruned", reason, group.width * size, kept * size, saved, cost)
        else:
            reason = "not worth what it would cost"
            if curve is not None and not curve.kept:
                reason = "its smallest cut alone moves the outputs too far"
                if curve.reason is not None:
                    reason = f"the model fails with its smallest cut: {curve.reason}"
            decision = LayerDecision(group.name, "kept", reason, group.width * size)
        run.layers.append(decision)


def _within(smaller: Plan, larger: Plan, groups: list[ChannelGroup]) -> bool:
    """Whether the plan ``larger`` prunes each group at least as far."""
    return all(larger.get(g, groups[g].width) <= kept for g, kept in smaller.items())
