"""Fits the few numbers of each GPU type that no data sheet has, over published runs, and leaves one model out in turn.

The fit minimises the mean over models of the squared logarithm of predicted over published, plus a pull towards a value
that is plausible before any run is seen, by Levenberg and Marquardt's steps with a numerical Jacobian.
"""

from dataclasses import replace

import numpy as np

from benchmarks.plan_rows import Row
from torch_sluice.plan import Cluster, predict

# Of each number: where it is pulled to, and by what factor it may differ before the pull is felt; the allowed range.
PRIORS = {
    "gemm_efficiency": {"a100-80g": 0.80, "h100-80g": 0.72, "b200": 0.48},
    "gemm_half_size": {"a100-80g": 100.0, "h100-80g": 150.0, "b200": 150.0},
    "memory_efficiency": {"a100-80g": 0.75, "h100-80g": 0.75, "b200": 0.66},
    "kernel_overhead": {"a100-80g": 5e-6, "h100-80g": 5e-6, "b200": 10e-6},
    "link_efficiency": {"a100-80g": 0.75, "h100-80g": 0.75, "b200": 0.67},
    "spread": {"a100-80g": 0.015, "h100-80g": 0.015, "b200": 0.015},
}
WIDTHS = {
    "gemm_efficiency": 0.1,
    "gemm_half_size": 0.5,
    "memory_efficiency": 0.15,
    "kernel_overhead": 0.7,
    "link_efficiency": 0.25,
    "spread": 0.7,
}
_LARGEST = {"gemm_efficiency": 1.0, "memory_efficiency": 0.95, "link_efficiency": 1.0}
_PULL = 0.02  # of a model's relative error that a departure by a whole width weighs as much as


def fit(cluster: Cluster, device: str, rows: list[Row]) -> Cluster:
    """The cluster with its fitted numbers. All rows are of this device."""
    names = list(PRIORS)
    prior = np.log([PRIORS[name][device] for name in names])
    widths = np.array([WIDTHS[name] for name in names])
    upper = np.log([_LARGEST.get(name, np.inf) for name in names])
    counts = {family: sum(row.family == family for row in rows) for family in {row.family for row in rows}}
    weights = np.array([1 / np.sqrt(counts[row.family]) for row in rows])

    def residuals(point):
        changed = _apply(cluster, names, point)
        logs = [np.log(predict(row.shape, changed, row.layout).step_s / row.published_s) for row in rows]
        return np.concatenate([weights * np.array(logs), _PULL * (point - prior) / widths])

    point, damping = prior.copy(), 1e-3
    value = residuals(point)
    for _ in range(60):
        jacobian = np.stack([(residuals(point + step) - value) / 1e-4 for step in 1e-4 * np.eye(len(names))], axis=1)
        normal = jacobian.T @ jacobian
        for _ in range(12):
            change = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -jacobian.T @ value)
            trial = np.minimum(point + change, upper)
            next_value = residuals(trial)
            if next_value @ next_value < value @ value:
                break
            damping *= 4
        else:
            break
        gain = value @ value - next_value @ next_value
        point, value, damping = trial, next_value, damping / 4
        if gain < 1e-10 * (value @ value):
            break
    return _apply(cluster, names, point)


def _apply(cluster, names, point):
    return replace(cluster, **{name: float(np.exp(x)) for name, x in zip(names, point, strict=True)})


def predictions(clusters: dict[str, Cluster], rows: list[Row]) -> np.ndarray:
    return np.array([predict(row.shape, clusters[row.device], row.layout).step_s for row in rows])


def leave_one_model_out(clusters: dict[str, Cluster], rows: list[Row], fitted_on: list[Row]) -> np.ndarray:
    """Predicted seconds of ``rows``, each by numbers that no run of its model was used for."""
    result = np.zeros(len(rows))
    for family in sorted({row.family for row in rows}):
        others = [row for row in fitted_on if row.device == family[0] and row.family != family]
        cluster = fit(clusters[family[0]], family[0], others)
        for i, row in enumerate(rows):
            if row.family == family:
                result[i] = predict(row.shape, cluster, row.layout).step_s
    return result
