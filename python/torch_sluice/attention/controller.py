"""Controllers: what drives the gates of a model to a density, or to the least density that a quality allows."""

import math
import warnings

import torch

from torch_sluice.attention.density import sample_gate
from torch_sluice.attention.gate import Gate
from torch_sluice.attention.recomputed import Owed, in_backward, in_checkpoint, remember


def _check_share(name, value, low=0.0, high=1.0, open_low=False):
    if not (low < value if open_low else low <= value) or not value <= high:
        raise ValueError(f"{name} is {value}, expected a number in {'(' if open_low else '['}{low:g}, {high:g}]")


def parameter_groups(model, lr, weight_decay=0.0, *, gate_lr=None):
    """Parameter groups for an optimizer: the gates learn faster than the rest, and do not decay.

    Args:
        model: any module; parameters that need no gradient are left out.
        lr: learning rate of everything but the gates.
        weight_decay: of everything but the gates, whose weight decay is 0: it would open or close them for no reason.
        gate_lr: learning rate of the gates; default ``10 * lr`` (5 to 20 times is what works).

    Returns:
        A list of one or two dicts for ``torch.optim``: the rest, then the gates.
    """
    gates = {id(p): p for m in model.modules() if isinstance(m, Gate) for p in m.parameters() if p.requires_grad}
    rest = [p for p in model.parameters() if p.requires_grad and id(p) not in gates]
    gate_lr = 10.0 * lr if gate_lr is None else gate_lr
    groups = [{"params": rest, "lr": lr, "weight_decay": weight_decay}] if rest else []
    if gates:
        groups.append({"params": list(gates.values()), "lr": gate_lr, "weight_decay": 0.0})
    return groups


def _learning_gates(model):
    gates = [module for module in model.modules() if isinstance(module, Gate) and module.learn]
    if not gates:
        raise ValueError(
            f"model is a {type(model).__name__} without a gate that learns, expected one that was made with "
            "torch_sluice.swap_attention(model, target_density=...) or torch_sluice.GatedAttention(...)"
        )
    return gates


def _target_density_of(model):
    """The target that the gates of a model were made with."""
    targets = {gate.target_density for gate in _learning_gates(model)} - {None}
    if len(targets) > 1:
        raise ValueError(
            f"target_density is None and the gates of model have {sorted(targets)}, expected one target for all: they "
            "share the budget"
        )
    if not targets:
        raise ValueError(
            "target_density is None, expected a number in (0, 1] here or where the gates were made, as in "
            "torch_sluice.swap_attention(model, target_density=...)"
        )
    return targets.pop()


class _AroundForward:
    """The hook by which a controller hears of a forward's begin, and of its end, when it is given the output, too. A
    copy of the model, or its pickle, is not listened to."""

    def __init__(self, controller: "_Controller | None" = None):
        self._controller = controller

    def __call__(self, module, *args):
        if self._controller is not None:
            self._controller._hear(module, begins=len(args) == 1)

    def __getstate__(self):
        return {"_controller": None}


class _Controller:
    """Listens to the gates of a model, sums up what they did since the last step, and leads them through the phases.

    Subclasses move ``strength``, the weight of the mean gate in the loss.
    """

    def __init__(self, model, steps, straight_through, rows, noise, hard):
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"steps is {steps!r}, expected a positive integer")
        _check_share("straight_through", straight_through)
        _check_share("rows", rows)
        _check_share("hard", hard)
        if straight_through + hard > 1:
            raise ValueError(
                f"straight_through is {straight_through} and hard is {hard}, expected shares of the steps that sum up "
                "to at most 1"
            )
        if not 0.0 <= noise < math.inf:
            raise ValueError(f"noise is {noise}, expected a standard deviation of at least 0")
        self.gates = _learning_gates(model)
        self.steps, self.straight_through, self.rows, self.noise, self.hard = steps, straight_through, rows, noise, hard
        self.count, self.strength, self.density, self._floor = 0, 0.0, 1.0, 0.0
        self._sums, self._frozen_said = None, False
        for gate in self.gates:
            gate.record = []
        # A forward whose loss never came, or one recomputed by checkpointing, must not count.
        hook = _AroundForward(self)
        self._hooks = [model.register_forward_pre_hook(hook), model.register_forward_hook(hook)]
        self._enter_phase()

    def loss(self, loss):
        """``loss + strength * (mean gate)``, the mean taken over the far pairs of the last forward of the model.

        Call it once per forward in training mode, with the scalar loss before it is divided by the number of
        micro-batches or scaled. Not within a re-entrant checkpoint, but on what that returns.
        """
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise ValueError(f"loss is {loss!r}, expected a tensor of one element")
        if in_checkpoint():
            raise RuntimeError(
                "loss() is called within a re-entrant checkpoint, expected it behind that: on what it returns"
            )
        mean, owed = self._listen(loss.detach().double())
        self._look_for_learners()
        return remember(loss + (self.strength * mean).to(loss.dtype).to(loss.device), owed)

    def step(self):
        """Call it after each optimizer step: measures, moves ``strength``, and goes on in the schedule."""
        sums = self._take_sums()
        if sums is not None:
            kept, near, possible, loss, calls = sums
            self.density, self._floor = (kept / possible, near / possible) if possible else (1.0, 1.0)
            self._move(loss / calls)
        self.count += 1
        for gate in self.gates:
            gate.owed = []
        self._enter_phase()

    def close(self):
        """Stops listening and leaves the gates in the phase "hard", as deployed."""
        for hook in self._hooks:
            hook.remove()
        for gate in self.gates:
            gate.record, gate.phase, gate.recomputes, gate.owed = None, "hard", False, []

    @property
    def phase(self):
        """Phase of the gates for the next forward."""
        return self.gates[0].phase

    def state_dict(self):
        """What a checkpoint needs to go on: numbers only."""
        return {"count": self.count, "strength": self.strength, "density": self.density}

    def load_state_dict(self, state):
        """Goes on where the controller that gave ``state`` was; its arguments are those given to this one."""
        own = self.state_dict()
        missing = own.keys() - state.keys()
        if missing:
            raise ValueError(f"state lacks {sorted(missing)}, expected the state_dict of a {type(self).__name__}")
        for name, value in own.items():
            if not math.isfinite(float(state[name])) or float(state[name]) < 0:
                raise ValueError(f"state['{name}'] is {state[name]!r}, expected a finite number that is not negative")
            setattr(self, name, type(value)(state[name]))
        self._enter_phase()

    def _move(self, loss):
        raise NotImplementedError

    def _enter_phase(self):
        progress = self.count / self.steps
        if progress < self.straight_through:
            phase, rows = "straight_through", 1.0
        elif progress < 1.0 - self.hard:
            phase, rows = "noise", self.rows
        else:
            phase, rows = "hard", 0.0
        for gate in self.gates:
            gate.phase, gate.rows, gate.noise = phase, rows, self.noise

    def _look_for_learners(self):
        """Says once that all gates were frozen since, as by a library that freezes what it has not made itself."""
        if self._frozen_said or any(p.requires_grad for gate in self.gates for p in gate.parameters()):
            return
        self._frozen_said = True
        warnings.warn(
            "no gate learns: none of their parameters requires a gradient any more. Who trains an adapter (peft) "
            'freezes all else: make it with modules_to_save=["sluice_gate"], or call requires_grad_(True) on each of '
            "torch_sluice.gate_parameters(model) behind that and save them by torch_sluice.save_gates",
            stacklevel=3,
        )

    def _hear(self, module, begins):
        learns = module.training and (torch.is_grad_enabled() or in_checkpoint())
        again = in_backward()
        for gate in self.gates:
            gate.recomputes = begins and learns
            if begins and learns and gate.record is not None and not again:
                gate.record.clear()

    def _listen(self, loss):
        """Mean gate of all attention calls since the last forward, and who is owed its gradient because their call is
        run again in backward; adds what they kept to the sums."""
        means, later = [], []
        for gate in self.gates:
            for record in gate.record or ():
                mean, *counts = sample_gate(record.a, record.b, tau=record.tau, **record.near)
                means.append(mean)
                counts = torch.stack(counts).double()
                # Of a mask the possible pairs are those of the sample, and so are the kept ones.
                if record.kept is not None and record.near["attn_mask"] is None:
                    counts[0] = record.kept.sum()
                self._add(counts)
                if not record.a.requires_grad:
                    later.append(gate)
            if gate.record:
                gate.record.clear()
        if not means:
            raise RuntimeError(
                "no gate was used since the last loss, expected a forward of the model in training mode with gradients "
                "enabled before each call of loss()"
            )
        owed = []
        for gate in later:
            owed.append(Owed(self.strength / len(means)))
            gate.owed.append(owed[-1])
        device = self._sums.device
        self._add(torch.stack([*self._sums.new_zeros(3), loss.reshape(()).to(device), self._sums.new_ones(())]))
        return torch.stack([mean.to(device) for mean in means]).mean(), owed

    def _add(self, counts):
        """Sums of (kept, near, possible) pairs, loss, and calls of loss()."""
        if self._sums is None:
            self._sums = counts.new_zeros(5)
        self._sums = self._sums + torch.nn.functional.pad(counts, (0, 5 - len(counts))).to(self._sums.device)

    def _take_sums(self):
        """The sums since the last call, over all ranks, or None if there were none; waits for the device."""
        if self._sums is None:
            return None
        sums, self._sums = self._sums, None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        return sums.tolist()


class DensityController(_Controller):
    """Drives the share of query-key pairs that a model computes to ``target_density`` while it trains.

    The loss gets ``strength * (mean gate over the far pairs)``, and after each step ``strength`` becomes
    ``max(0, strength + gain * (density - goal))``. density counts the pairs that the hard threshold keeps, those of
    window and sinks included, over all that the causal mask allows, in all gates together: layers and heads share the
    budget as they see fit. The goal goes from 1 to target_density over the first ``ramp`` of the steps. The target is a
    ceiling: gates that close further by themselves, because what they drop only disturbed, are let::

        torch_sluice.swap_attention(model, target_density=0.1)
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
        controller = DensityController(model, steps=steps)
        for batch in batches:
            controller.loss(loss_of(model, batch)).backward()
            optimizer.step()
            optimizer.zero_grad()
            controller.step()
        controller.close()

    Args:
        model: a module that holds gates that learn.
        target_density: share in (0, 1] of the pairs; default: what its gates were made with, by ``swap_attention``,
            ``GatedAttention`` or ``Gate``.
        steps: optimizer steps of the whole training, which the shares below refer to.
        gain: of the controller.
        ramp: share of the steps over which the goal falls.
        straight_through: share of the steps, at the start, in the phase "straight_through": what dropped pairs would
            have changed is worked out for every query row, which is dense work.
        rows: after that, the share of the query rows for which it is; 0 for none.
        noise: after that, the standard deviation of the exploration noise on a and b, so that every row sees a few of
            its dropped pairs; 0 for none.
        hard: share of the steps, at the end, without either: the function that is deployed.

    Attributes:
        density: kept pairs / possible pairs at the last step (1 before the first), as the kernel counted them. Under
            noise and with a mask it is that of a sample of the rows, beyond 2^19 pairs per attention call;
            ``kept_pairs`` counts exactly.
        goal: what the density is held to now.
        strength: present weight of the mean gate in the loss.
        phase: of the next forward, one of ``torch_sluice.attention.PHASES``.
        count: steps done.
    """

    def __init__(
        self, model, target_density=None, steps=None, *, gain=0.2, ramp=0.5, straight_through=0.0, rows=0.03125,
        noise=0.0, hard=0.1,
    ):  # fmt: skip
        if target_density is None:
            target_density = _target_density_of(model)
        _check_share("target_density", target_density, open_low=True)
        _check_share("ramp", ramp)
        if not 0.0 <= gain < math.inf:
            raise ValueError(f"gain is {gain}, expected a finite number of at least 0")
        self.target_density, self.gain, self.ramp = target_density, gain, ramp
        self._warned = False
        super().__init__(model, steps, straight_through, rows, noise, hard)

    @property
    def goal(self):
        progress = min(1.0, self.count / (self.ramp * self.steps)) if self.ramp else 1.0
        return 1.0 + (self.target_density - 1.0) * progress

    def _move(self, loss):
        goal = self.goal
        if goal < self._floor:
            # No gate can go below what window and sinks keep: a strength that grows without end would help nobody.
            if not self._warned and self.target_density < self._floor:
                self._warned = True
                warnings.warn(
                    f"target_density is {self.target_density:.3g}, but window and sinks alone keep {self._floor:.3g} "
                    "of the pairs of these inputs: expected a smaller window or a larger target",
                    stacklevel=3,
                )
            goal = self._floor
        self.strength = max(0.0, self.strength + self.gain * (self.density - goal))


class QualityController(_Controller):
    """Closes the gates of a model as far as its loss stays below a ceiling: for who would rather name the quality.

    As ``DensityController``, but ``strength`` becomes ``max(0, strength + gain * (ceiling - loss) / ceiling)`` with the
    loss smoothed over the last steps: it grows while the loss is below the ceiling and falls while it is above, which
    minimises the density subject to ``loss <= ceiling``.

    Args:
        model: a module that holds gates that learn.
        ceiling: positive number that the training loss should stay below, e.g. 1.02 times that of the dense model.
        steps, gain, straight_through, rows, noise, hard: as in ``DensityController``.
        smoothing: weight in [0, 1) of the past in the running mean of the loss.

    Attributes:
        smoothed_loss: running mean of the loss, None before the first step.
        density, strength, phase, count: as in ``DensityController``.
    """

    def __init__(
        self,
        model,
        ceiling,
        steps,
        *,
        gain=0.05,
        smoothing=0.9,
        straight_through=0.0,
        rows=0.03125,
        noise=0.0,
        hard=0.1,
    ):
        if not 0.0 < ceiling < math.inf:
            raise ValueError(f"ceiling is {ceiling}, expected a positive, finite loss")
        if not 0.0 <= smoothing < 1.0:
            raise ValueError(f"smoothing is {smoothing}, expected a number in [0, 1)")
        if not 0.0 <= gain < math.inf:
            raise ValueError(f"gain is {gain}, expected a finite number of at least 0")
        self.ceiling, self.gain, self.smoothing, self.smoothed_loss = ceiling, gain, smoothing, None
        super().__init__(model, steps, straight_through, rows, noise, hard)

    def state_dict(self):
        return {**super().state_dict(), "smoothed_loss": self.smoothed_loss or 0.0}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.smoothed_loss = self.smoothed_loss or None

    def _move(self, loss):
        old = loss if self.smoothed_loss is None else self.smoothed_loss
        self.smoothed_loss = self.smoothing * old + (1.0 - self.smoothing) * loss
        self.strength = max(0.0, self.strength + self.gain * (self.ceiling - self.smoothed_loss) / self.ceiling)
