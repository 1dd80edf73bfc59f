"""The session behind ``torch_sluice.accumulate``: takes gradients as they are born, and steps once a window."""

import functools
import math
import types
import warnings
import weakref

import torch
from torch import nn

from torch_sluice.accumulate import grad_scaler
from torch_sluice.accumulate.data_parallel import DataParallel
from torch_sluice.accumulate.policy import make_policy
from torch_sluice.accumulate.report import SessionStats, make_stats
from torch_sluice.accumulate.sharded import any_rank, is_dtensor, local_gradient, local_part
from torch_sluice.accumulate.slot import Slot
from torch_sluice.accumulate.weights import Weights
from torch_sluice.accumulate.window import Window

open_sessions: "weakref.WeakSet[Session]" = weakref.WeakSet()  # those that are entered and not left


class Session:
    """What ``with torch_sluice.accumulate(...) as session`` gives; see there for the arguments.

    Attributes:
        steps: steps that the optimizer has made.
        skipped_steps: windows that were dropped because a gradient was not finite.
        micro_batches: micro-batches so far.
        windows: windows that have ended, by a step or by a skipped one.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, options):
        self.model, self.optimizer, self.options = model, optimizer, options
        self.policy = make_policy(options.policy, options.tolerance, options.every)
        self.window = Window(options.every, options.step_calls)
        self.parallel = DataParallel(model)
        self.slots: dict[nn.Parameter, Slot] = {}
        self.steps = self.skipped_steps = self.micro_batches = self.windows = 0
        self._open = False
        self._task = -1  # the backward pass in progress, by autograd's number
        self._pending = []  # (record, statistics tensor) that have not been read yet
        self._weights = Weights(options.reduction)
        self._handles = []
        self._warned = False
        self._adopt_parameters()
        if not self.slots:
            raise ValueError("the optimizer has no parameter that requires a gradient")
        if options.low_memory and self.parallel:
            raise ValueError("low_memory=True hides gradients from DistributedDataParallel, which must average them")

    # ---- opening and closing

    def __enter__(self) -> "Session":
        grad_scaler.attach(self.optimizer, self)
        self._open = True
        open_sessions.add(self)
        self._step_before = self.optimizer.__dict__.get("step")
        self._original_step = self.optimizer.step
        self._wrap_step()
        for slot in self.slots.values():
            self._hook(slot)
        self.parallel.plan(self.window)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self._open = False
        open_sessions.discard(self)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self.optimizer.__dict__.get("step") is self._step_inside:
            del self.optimizer.step
            if self._step_before is not None:
                self.optimizer.step = self._step_before
        grad_scaler.detach(self.optimizer)
        self.parallel.restore()
        if kind is None and self._pending_slots():
            warnings.warn(
                f"accumulation ended {self._progress()}: no step was made with their gradients, they are left in .grad",
                stacklevel=2,
            )
            for slot in self._pending_slots():
                slot.leave(self._divisor())
        for slot in self.slots.values():
            slot.unwatch()

    def _wrap_step(self) -> None:
        @functools.wraps(self._original_step)
        def step(optimizer, *args, **kwargs):
            return self._call_step(*args, **kwargs) if self._open else self._original_step(*args, **kwargs)

        # A bound method, as the step that it stands for: learning rate schedulers look for its __func__.
        self._step_inside = self.optimizer.step = types.MethodType(step, self.optimizer)

    def _adopt_parameters(self) -> None:
        """Takes in parameters that are new to the optimizer or have begun to require gradients."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        for number, group in enumerate(self.optimizer.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter in self.slots or not parameter.requires_grad or not parameter.is_leaf:
                    continue
                name = names.get(parameter, f"optimizer.{number}.{place}")
                if is_dtensor(parameter) and self.options.low_memory:
                    raise ValueError(
                        f"low_memory=True and parameter {name} is a DTensor, expected plain tensors: a step that goes "
                        "through sharded parameters one by one can't agree with the other ranks"
                    )
                self.slots[parameter] = Slot(len(self.slots), name, parameter)
                if self._open:
                    self._hook(self.slots[parameter])

    def _hook(self, slot: Slot) -> None:
        self._handles.append(slot.parameter.register_post_accumulate_grad_hook(lambda _: self._take(slot)))

    # ---- during a backward pass

    def _take(self, slot: Slot) -> None:
        """Adds the gradient that autograd has just finished to its sum, and frees it."""
        if slot.parameter.grad is None:
            return
        self._notice_backward()
        if slot.shown is not None and is_dtensor(slot.parameter):
            self._notice_unannounced(slot)
        grad = local_gradient(slot.parameter)
        slot.parameter.grad = None
        record, accumulator = slot.record, slot.accumulator
        if accumulator.empty and slot.supported:
            accumulator.start(self.policy.choose(record))
        if accumulator.format == "fp16" and self.policy.wants_fp32(record, grad):
            record.promotions += not accumulator.empty
            accumulator.promote()
        seed = slot.draw(self.options.seed) if self.options.rounding == "stochastic" else None
        self._pending.append((record, accumulator.add(grad.detach(), self._weights.weight, seed)))
        record.folds += 1
        self.window.note_gradient(record.folds)
        if self.window.is_last(record.folds) or self.parallel.reduces_now:
            self._show(slot)

    def _notice_unannounced(self, slot: Slot) -> None:
        """FSDP2 writes gradients itself: nothing tells beforehand that one comes to where a sum is shown."""
        if slot.parameter.grad is slot.shown:
            raise RuntimeError(
                f"parameter {slot.name} got a gradient although its sum was in .grad already, expected step() or "
                f"zero_grad() after every {self.window.every} micro-batches: FSDP2 has added the two"
            )
        grad, slot.parameter.grad = slot.parameter.grad, None
        self._before_gradient(slot)
        slot.parameter.grad = grad

    def _notice_backward(self) -> None:
        task = torch._C._current_graph_task_id()
        if task == self._task:
            return
        self._task = task
        self._read_statistics()
        if task != -1:
            torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        """Shows the sums of parameters that got no gradient in the window's last backward pass."""
        if not self._open:
            return
        if self.window.kind == "each":
            finished = self.window.comes_last
        else:
            finished = self.window.backwards >= self.window.every
        if finished:
            self._show_all()
        elif self.parallel.reduces_now:  # what was shown for DDP alone; its own callback, queued by now, comes first
            torch.autograd.Variable._execution_engine.queue_callback(self._hide_all)

    def _hide_all(self) -> None:
        for slot in self.slots.values():
            if slot.shown is not None and not slot.dropped:
                slot.hide()

    def _show(self, slot: Slot) -> None:
        if not self.options.low_memory:
            slot.show(self._divisor(), self._before_gradient)

    def _show_all(self) -> None:
        for slot in self._pending_slots():
            if slot.shown is None:
                self._show(slot)

    def _pending_slots(self) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.pending]

    def _divisor(self) -> float:
        return self._weights.divisor(self.window.calls, self.parallel)

    def _before_gradient(self, slot: Slot) -> None:
        """Another gradient comes although the sum is shown already."""
        if not slot.dropped:
            slot.hide()
            return
        # Gradients were removed instead of used for a step: a new window begins.
        for other in self.slots.values():
            if other.dropped:
                other.start_window()
        self._start_window()

    def _read_statistics(self) -> None:
        """Brings the statistics of all gradients since the last time to the records: one transfer a device."""
        pending, self._pending = self._pending, []
        by_device = {}
        for record, stats in pending:
            by_device.setdefault(stats.device, []).append((record, stats))
        for group in by_device.values():
            for (record, _), numbers in zip(group, torch.stack([stats for _, stats in group]).tolist(), strict=True):
                record.note(numbers)

    # ---- at a call of step()

    def count(self, tokens: float) -> None:
        """Says how many tokens (or samples) the coming micro-batch has, before its backward pass.

        The averaged gradient is then the sum over micro-batches of tokens x gradient, divided by the sum of tokens
        (``reduction="mean"``), or the sum of gradients divided by that sum (``reduction="sum"``). Under
        DistributedDataParallel tokens of all ranks are added up. Once in a window means in each of its micro-batches.

        Raises:
            ValueError: tokens is negative or not finite.
            RuntimeError: earlier micro-batches of this window were not counted; or parameters are DTensors, whose
                gradients are averaged over ranks before they are weighed.
        """
        if any(is_dtensor(parameter) for parameter in self.slots):
            raise RuntimeError("count() was called and parameters are DTensors, expected plain tensors")
        self._weights.count(tokens, self._pending_slots() != [])

    def publish(self) -> None:
        """Puts the averaged gradients of the micro-batches so far into ``.grad``, where they can be read and changed.

        Only needed where a loop steps before its window is full (a last, shorter one) and looks at gradients first.
        """
        if self.options.low_memory:
            raise RuntimeError("low_memory=True hides gradients, so there is nothing to publish")
        self._show_all()

    def reset(self) -> None:
        """Drops the gradients of the window so far, as after a micro-batch that failed; a new window begins."""
        for slot in self.slots.values():
            slot.parameter.grad = None
            slot.start_window()
        self._pending.clear()
        self._start_window()
        self.parallel.plan(self.window)

    def prepare_step(self) -> bool:
        """Whether the call of step() that is about to be made acts; if so, gradients can be seen from now on."""
        if self.options.low_memory:
            raise RuntimeError(
                "low_memory=True hides gradients from GradScaler, which must look at them: use one of both"
            )
        acts = self.window.acts()
        if acts:
            self._show_all()
        return acts

    def _call_step(self, *args, **kwargs):
        closure = args[0] if args else kwargs.get("closure")
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            args, kwargs = (lambda: loss,), {}
        if not self.window.acts():
            self.hold_step()
            return loss if closure is not None else None
        if not self._pending_slots():
            return self._original_step(*args, **kwargs)
        return self._act(args, kwargs)

    def hold_step(self) -> None:
        """Notes a call of step() that does nothing, because the window is not full."""
        self.window.hold()
        self.micro_batches += 1
        self._weights.end_micro_batch()
        self.optimizer._opt_called = True  # what learning rate schedulers ask for: step() was called before theirs
        self._adopt_parameters()
        self.parallel.plan(self.window)

    def _act(self, args, kwargs):
        hidden = any(slot.shown is None for slot in self._pending_slots()) and not self.options.low_memory
        if hidden and self.window.kind == "last" and not self._warned:
            self._warned = True
            warnings.warn(
                f"step() came {self._progress()}, and gradients can be seen only from now on; "
                "where code before step() looks at them (clip_grad_norm_), call session.publish() first",
                stacklevel=4,
            )
        self._show_all()
        self._read_statistics()
        spoiled = [] if hasattr(self.optimizer, "found_inf") else self._find_spoiled()
        if any_rank(bool(spoiled), self.slots):
            names = ", ".join(slot.name for slot in spoiled[:3]) + (", ..." if len(spoiled) > 3 else "")
            names = names or "on another rank"
            warnings.warn(
                f"step skipped: {len(spoiled)} of {len(self.slots)} gradients are not finite ({names}); "
                "the gradients of this window are dropped, nothing else is",
                stacklevel=4,
            )
            self.skip_step()
            return None
        self._note_norms()
        step = self._step_one_by_one if self.options.low_memory else self._original_step
        result = step(*args, **kwargs)
        self.steps += 1
        self._end_window()
        return result

    def _find_spoiled(self) -> list[Slot]:
        """Parameters whose averaged gradient is not finite. Only suspects are looked at: the kernels have counted."""
        spoiled = []
        for slot in self.slots.values():
            record, grad = slot.record, slot.parameter.grad
            suspect = record.nonfinite > 0 or record.sum_sumsq == math.inf
            if self.options.low_memory:
                spoiled += [slot] if suspect and slot.pending else []
            elif grad is not None and (suspect or grad.dtype == torch.float16):
                grad = local_part(grad)
                values = grad.coalesce().values() if grad.is_sparse else grad
                spoiled += [] if values.isfinite().all() else [slot]
        return spoiled

    def _note_norms(self) -> None:
        divisor = self._divisor()
        for slot in self.slots.values():
            slot.record.step_norm = math.sqrt(slot.record.sum_sumsq) / divisor if slot.pending else 0.0

    def _step_one_by_one(self, *args, **kwargs):
        """Reads, averages, clips and steps one parameter at a time: no two averaged gradients exist at once."""
        scale, result = 1 / self._divisor(), None
        if self.options.max_norm is not None:
            norm = math.sqrt(sum(slot.record.step_norm**2 for slot in self.slots.values()))
            scale *= min(1.0, self.options.max_norm / (norm + 1e-6))
        for slot in self.slots.values():
            if slot.accumulator.empty:
                continue
            slot.parameter.grad = slot.accumulator.take(scale)
            result = self._original_step(*args, **kwargs)
            slot.parameter.grad = None
        return result

    def skip_step(self) -> None:
        """Drops the gradients of this window and counts a skipped step."""
        self.skipped_steps += 1
        self._end_window()

    def _end_window(self) -> None:
        self._read_statistics()
        self.micro_batches += 1 if self.window.kind == "each" else self.window.backwards
        for slot in self.slots.values():
            slot.parameter.grad = None
            self.policy.end_window(slot.record)
            slot.start_window()
        self.windows += 1
        self._start_window()
        self._adopt_parameters()
        self.parallel.plan(self.window)

    def _start_window(self) -> None:
        self.window.start()
        self._weights.start()

    # ---- looking in, and coming back

    def _progress(self) -> str:
        unit = "calls of step()" if self.window.kind == "each" else "backward passes"
        done = self.window.calls if self.window.kind == "each" else self.window.backwards
        return f"after {done} of {self.window.every} {unit}"

    @property
    def fp16_share(self) -> float:
        """Elements whose sum is float16 / elements: what ``stats()`` has, without the rest."""
        half = sum(slot.record.elements for slot in self.slots.values() if slot.accumulator.format == "fp16")
        return half / max(sum(slot.record.elements for slot in self.slots.values()), 1)

    def stats(self) -> SessionStats:
        """Formats, bytes, norms and errors, in all and by parameter."""
        self._read_statistics()
        return make_stats(self)

    def state_dict(self) -> dict:
        """Everything that a later session needs to go on exactly from here, in the middle of a window too.

        Tensors in it are the session's own, as in other state_dicts of torch: save or copy it before training goes on.
        """
        self._read_statistics()
        return {
            "version": 1,
            "window": self.window.state_dict(),
            "weights": self._weights.state_dict(),
            "counters": [self.steps, self.skipped_steps, self.micro_batches, self.windows],
            "parameters": {slot.name: slot.state_dict() for slot in self.slots.values()},
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on where another session stood when its ``state_dict()`` was taken.

        Raises:
            ValueError: the state has another version, window or set of parameters; the message names the difference.
        """
        if state.get("version") != 1:
            raise ValueError(f"the version of the state is {state.get('version')!r}, expected 1")
        lacking = {"window", "weights", "counters", "parameters"} - state.keys()
        if lacking:
            raise ValueError(f"the state lacks {', '.join(map(repr, sorted(lacking)))}")
        by_name = {slot.name: slot for slot in self.slots.values()}
        differing = sorted(by_name.keys() ^ state["parameters"].keys())
        if differing:
            raise ValueError(f"the state and the optimizer differ in these parameters: {', '.join(differing[:5])}")
        self._pending.clear()
        self.window.load_state_dict(state["window"])
        for name, slot in by_name.items():
            try:
                slot.load_state_dict(state["parameters"][name], self._before_gradient)
            except KeyError as error:
                raise ValueError(f"the state of parameter {name} lacks {error}") from error
            except ValueError as error:
                raise ValueError(f"parameter {name}: {error}") from error
        self._weights.load_state_dict(state["weights"])
        self.steps, self.skipped_steps, self.micro_batches, self.windows = map(int, state["counters"])
        self.parallel.plan(self.window)
