"""Controllers: what drives the gates of a model to a density, or to the least density that a quality allows."""

import warnings

import torch

from torch_sluice.attention.density import sample_gate
from torch_sluice.attention.gate import Gate


class _Controller:
    """Listens to the gates of a model and sums up what they did since the last step."""

    def __init__(self, model):
        self.gates = [module for module in model.modules() if isinstance(module, Gate) and module.learn]
        if not self.gates:
            raise ValueError(
                f"model is a {type(model).__name__} without a gate that learns, expected one that was made with "
                "torch_sluice.swap_attention(model, target_density=...) or torch_sluice.GatedAttention(...)"
            )
        self._kept = self._possible = None
        for gate in self.gates:
            gate.record = []
        # A forward whose loss never came (or one recomputed by checkpointing) must not count twice.
        self._hook = model.register_forward_pre_hook(lambda *_: self._forget())

    def _forget(self):
        if torch.is_grad_enabled():
            for gate in self.gates:
                gate.record.clear()

    def close(self):
        """Stops listening and leaves the gates in the phase "hard", as deployed."""
        self._hook.remove()
        for gate in self.gates:
            gate.record, gate.phase = None, "hard"

    def _mean_gate(self):
        """Mean g over the far pairs of all attention calls since the last forward; counts the kept pairs of them."""
        means = []
        for gate in self.gates:
            for a, b, tau, *options in gate.record:
                options = dict(zip(("causal", "window", "sinks", "key_range"), options, strict=True))
                mean, kept, possible = sample_gate(a, b, tau=tau, **options)
                means.append(mean)
                self._kept = kept if self._kept is None else self._kept + kept
                self._possible = possible if self._possible is None else self._possible + possible
            gate.record.clear()
        if not means:
            raise RuntimeError(
                "no gate was used since the last loss: call the model in training mode, with gradients enabled, first"
            )
        return torch.stack([mean.to(means[0].device, means[0].dtype) for mean in means]).mean()

    def _take_density(self):
        """Kept over possible pairs since the last call, over all ranks; None if nothing was counted."""
        if self._kept is None:
            return None
        counts = torch.stack([self._kept, self._possible])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        self._kept = self._possible = None
        kept, possible = counts.tolist()
        return kept / possible if possible else 1.0


class DensityController(_Controller):
    def __init__(self, model, target_density, steps, *, gain=0.2, ramp=0.5, straight_through=0.2, noise=0.0, rows=0.125, hard=0.1):
        super().__init__(model)
        self.target_density, self.steps, self.gain, self.ramp = target_density, steps, gain, ramp
        self.straight_through, self.noise, self.rows, self.hard = straight_through, noise, rows, hard
        self.count, self.strength, self.density = 0, 0.0, 1.0
        self._enter()

    @property
    def goal(self):
        progress = min(1.0, self.count / max(1.0, self.ramp * self.steps))
        return 1.0 + (self.target_density - 1.0) * progress

    def _enter(self):
        t = self.count / self.steps
        phase = "straight_through" if t < self.straight_through else "noise" if t < 1 - self.hard else "hard"
        rows = 1.0 if phase == "straight_through" else self.rows
        for g in self.gates:
            g.phase, g.rows, g.noise = phase, rows, self.noise

    def loss(self, loss):
        m = self._mean_gate()
        return loss + self.strength * m

    def step(self):
        d = self._take_density()
        if d is not None:
            self.density = d
            self.strength = max(0.0, self.strength + self.gain * (d - self.goal))
        self.count += 1
        self._enter()


def parameter_groups(model, lr, weight_decay=0.0, *, gate_lr=None):
    gate = [p for m in model.modules() if isinstance(m, Gate) for p in m.parameters() if p.requires_grad]
    ids = {id(p) for p in gate}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in ids]
    return [{"params": rest, "lr": lr, "weight_decay": weight_decay}, {"params": gate, "lr": 10 * lr if gate_lr is None else gate_lr, "weight_decay": 0.0}]
