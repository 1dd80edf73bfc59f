"""``AdaptiveAllReduce``: gradients averaged over data-parallel ranks in as few bytes as their numbers allow."""

import math
from collections.abc import Callable
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from torch_sluice.accumulate.operators import has_kernels
from torch_sluice.parallel import statistics
from torch_sluice.parallel.buckets import Buckets
from torch_sluice.parallel.channel import Channel, Options, Traffic, rescale
from torch_sluice.parallel.lane import lane_of
from torch_sluice.parallel.precision import LEVELS, AutoPrecision, FixedPrecision

POLICIES = ("auto", *LEVELS)

# Default tolerances. With error feedback an error is put right at the next step, so it may be of the order of what a
# mini-batch differs from the next; without, it is what accumulate allows a sum.
_TOLERANCE_WITH_FEEDBACK = 3e-2
_TOLERANCE_WITHOUT_FEEDBACK = 2e-3


class AdaptiveAllReduce:
    """Reduces gradients in int8, float16, bfloat16 or float32, bucket by bucket, as a hook of DDP or in FSDP2.

    ::

        state = AdaptiveAllReduce()
        state.apply_to_ddp(ddp_model)     # ddp_model.register_comm_hook(state, adaptive_all_reduce_hook)
        state.apply_to_fsdp(model)        # or this, after fully_shard(...)

    **What is sent.** Each rank encodes the part that each other rank is to sum, all parts are exchanged
    (all_to_all), each rank decodes and adds up its part in float32, and DDP's mean is encoded once more and gathered.
    int8 has a float32 step of amax / 127 for each 1024 elements, float16 the power of two of ops/sluice/accumulate.h.
    No sum is ever formed in a small format, so none overflows. All ranks get the same bits.

    **Error feedback.** What rounding has taken from a gradient stays in a float32 residual on the rank that rounded,
    and is added to the next gradient: x = g + r, send Q(x), r = x - Q(x). Over T steps the sum of what was delivered
    differs from the sum of the gradients by the last residuals alone (Seide et al. 2014; Karimireddy et al., ICML 2019,
    "Error Feedback Fixes SignSGD"). The residual takes 4 bytes an element; under FSDP2 that is the whole gradient and
    not a shard of it, so think twice there. The identity holds in units of the loss, so where a ``GradScaler``
    changes its scale from s to s', r has to become r s' / s, which is exact for its powers of two: give it as
    ``grad_scaler``. Without it, what is unsent at that moment counts s / s' of what it should: at the usual
    factors 2 and 1/2, an error of half of it or of all of it; to drop it would be one of all of it each time. In a step
    that the scaler skips, buckets that were finite lose what was unsent of them; it went with the gradient that nobody
    used.

    **Which format.** The ranks exchange the norm and the number of non-finite elements of their buckets, the error that
    int8 would make by the largest magnitude of each block, and how much float16 underflowed last; each applies the same
    rule to the same numbers (:mod:`torch_sluice.parallel.precision`), so all decide alike. A bucket with an infinity or
    NaN on any rank goes in float32 and arrives as with plain DDP, for ``GradScaler`` to see, and the residual waits.
    Buckets of fewer than 1024 elements for each rank, and dtypes other than float32, bfloat16 and float16, are reduced
    as they are.

    Args:
        policy: "auto": the format of the fewest bytes within the tolerance; "int8", "float16", "bfloat16": always that;
            "float32": nothing is compressed, and no numbers are exchanged.
        error_feedback: keep what rounding takes away, and send it with the next gradient.
        tolerance: for "auto", the relative error that a reduced gradient may have, as a ratio of norms. Default: 3e-2
            with error feedback, 2e-3 without.
        process_group: of the DDP module, for ``register_comm_hook`` with a module that has one of its own. None: the
            default group. ``apply_to_ddp`` and ``apply_to_fsdp`` find it out.
        timeout: of the second process group that DDP needs, see below. None: torch's default.
        grad_scaler: the ``torch.amp.GradScaler`` of the training loop, whose scale residuals then follow.

    One object serves one model. Under DDP the reduction runs on another thread while the backward pass goes on, in a
    second process group over the same ranks, made at the first bucket, so that its calls don't mix with others.

    Raises:
        ValueError: policy or tolerance is not allowed.
        TypeError: error_feedback, process_group, timeout or grad_scaler is something else.
    """

    def __init__(
        self,
        policy: str = "auto",
        *,
        error_feedback: bool = True,
        tolerance: float | None = None,
        process_group: distributed.ProcessGroup | None = None,
        timeout: timedelta | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ):
        if policy not in POLICIES:
            raise ValueError(f"policy is {policy!r}, expected one of {', '.join(map(repr, POLICIES))}")
        if not isinstance(error_feedback, bool):
            raise TypeError(f"error_feedback is {error_feedback!r}, expected True or False")
        if tolerance is not None and policy != "auto":
            raise ValueError(f"tolerance is given with policy={policy!r}, expected it with 'auto' only")
        if tolerance is None:
            tolerance = _TOLERANCE_WITH_FEEDBACK if error_feedback else _TOLERANCE_WITHOUT_FEEDBACK
        if not 0 < tolerance < math.inf:
            raise ValueError(f"tolerance is {tolerance}, expected a number above 0")
        if process_group is not None and not isinstance(process_group, distributed.ProcessGroup):
            raise TypeError(
                f"process_group is {process_group!r}, expected a process group that this rank is in, or None"
            )
        self.policy = policy
        rule = {"auto": AutoPrecision(tolerance), "float32": None}
        self.traffic = Traffic()
        self._options = Options(
            rule[policy] if policy in rule else FixedPrecision(policy),
            error_feedback and policy != "float32",
            self.traffic,
        )
        if timeout is not None and not isinstance(timeout, timedelta):
            raise TypeError(f"timeout is {timeout!r}, expected a datetime.timedelta or None")
        if grad_scaler is not None and not callable(getattr(grad_scaler, "get_scale", None)):
            raise TypeError(f"grad_scaler is {grad_scaler!r}, expected a torch.amp.GradScaler or None")
        self._group, self._timeout = process_group, timeout
        self._scaler = grad_scaler
        self._scale: float | None = None  # of the gradients that residuals are left of
        self._buckets = Buckets(self._options)
        self._modules: dict[str, Channel] = {}  # of FSDP2, by name
        self._shown = Traffic()

    # ---- DistributedDataParallel

    def apply_to_ddp(self, model: DistributedDataParallel) -> None:
        """Registers the hook with the module, for the module's process group."""
        if not isinstance(model, DistributedDataParallel):
            raise TypeError(f"model is a {type(model).__name__}, expected a DistributedDataParallel")
        self._group = model.process_group
        model.register_comm_hook(self, adaptive_all_reduce_hook)

    def reduce_bucket(self, bucket: distributed.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What the hook does; the future's value is the bucket's buffer, averaged in place."""
        buffer = bucket.buffer()
        _check_device(buffer)
        self._follow_scale()
        lane = lane_of(self._group, self._timeout)
        channel = self._buckets.channel(bucket.index(), bucket.parameters())
        future = torch.futures.Future(devices=[] if buffer.device.type == "cpu" else [buffer.device])
        if buffer.device.type == "cpu":
            launched = statistics.note_launch()
            lane.thread.submit(_reduce, channel, buffer, lane.group, future, launched)
        else:  # an accelerator's collectives run beside the backward pass anyway, and follow the current stream
            _reduce(channel, buffer, lane.group, future, launched=False)
        return future.then(lambda finished: finished.value())  # which turns an exception into one that DDP understands

    # ---- FSDP2

    def apply_to_fsdp(self, model: nn.Module) -> None:
        """Has every ``fully_shard``-ed module in the model reduce-scatter its gradients this way.

        With hybrid sharding (HSDP) the all-reduce between replicas stays as it is. A gradient divide factor of one's
        own is a reduction that is not compressed.

        Raises:
            ValueError: no module of the model is sharded.
        """
        from torch.distributed.fsdp import FSDPModule

        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
        sharded = {name: module for name, module in model.named_modules() if isinstance(module, FSDPModule)}
        if not sharded:
            raise ValueError("no module of model is sharded, expected fully_shard(...) to be called before")
        for name, module in sharded.items():
            channel = self._modules.setdefault(name, Channel(self._options))
            module.set_custom_reduce_scatter(_ReduceScatter(channel, self._follow_scale))

    # ---- GradScaler

    def _follow_scale(self) -> None:
        """Brings residuals to the scale of the gradients that come. It never changes within a backward pass."""
        if self._scaler is None:
            return
        scale = self._scaler.get_scale()
        if self._scale is not None and scale != self._scale:
            factor = scale / self._scale if self._scale else 0.0
            self._buckets.rescale(factor)
            for channel in self._modules.values():
                if channel.residual is not None:
                    rescale(channel.residual, factor)
        self._scale = scale

    # ---- looking in, and coming back

    @property
    def formats(self) -> dict[str, str]:
        """The format of each bucket's last reduction, by name: ``bucket.0`` (DDP) or ``fsdp.`` and the module's."""
        names = {f"bucket.{index}": channel for index, channel in sorted(self._buckets.channels.items())}
        names.update({f"fsdp.{name}": channel for name, channel in self._modules.items()})
        return {name: channel.format for name, channel in names.items() if channel.format}

    def figures(self) -> dict[str, float]:
        """What was sent since this was last called, for ``Monitor``: called once a step, the figures of the step.

        ``gradient_bytes_sent`` and ``gradient_bytes_uncompressed`` by this rank, and their ratio
        ``gradient_compression``, see :class:`~torch_sluice.parallel.channel.Traffic`.
        """
        sent = self.traffic.bytes_sent - self._shown.bytes_sent
        uncompressed = self.traffic.bytes_uncompressed - self._shown.bytes_uncompressed
        self._shown = Traffic(self.traffic.bytes_sent, self.traffic.bytes_uncompressed)
        return {
            "gradient_bytes_sent": sent,
            "gradient_bytes_uncompressed": uncompressed,
            "gradient_compression": uncompressed / sent if sent else 1.0,
        }

    def state_dict(self) -> dict:
        """Residuals and records of this rank, copied. Every rank has its own, so each saves its own.

        To be called between a step and the next backward pass.
        """
        modules = {
            name: {"record": channel.record.state_dict(),
                   "residual": None if channel.residual is None else channel.residual.clone()}
            for name, channel in self._modules.items()
        }  # fmt: skip
        return {"version": 1, "scale": self._scale, "buckets": self._buckets.state_dict(), "modules": modules}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where ``state_dict()`` was taken, in a job of as many ranks. FSDP2: after ``apply_to_fsdp``.

        A residual whose parameter has another shape now is dropped.

        Raises:
            ValueError: the state has another version, lacks something, or is of modules that the model doesn't have.
        """
        if not isinstance(state, dict) or state.get("version") != 1:
            version = state.get("version") if isinstance(state, dict) else type(state).__name__
            raise ValueError(f"the version of the state is {version!r}, expected 1")
        try:
            unknown = state["modules"].keys() - self._modules.keys()
            if unknown:
                raise ValueError(f"the state has a module {min(unknown)!r}, which apply_to_fsdp() has not seen")
            self._buckets.load_state_dict(state["buckets"])
            self._scale = state["scale"]
            for name, saved in state["modules"].items():
                channel, residual = self._modules[name], saved["residual"]
                channel.record.load_state_dict(saved["record"])
                channel.residual = None if residual is None else residual.to(torch.float32, copy=True)
        except KeyError as error:
            raise ValueError(f"the state lacks {error}") from error


def adaptive_all_reduce_hook(
    state: AdaptiveAllReduce, bucket: distributed.GradBucket
) -> torch.futures.Future[torch.Tensor]:
    """The hook for ``DistributedDataParallel.register_comm_hook``, with an :class:`AdaptiveAllReduce` as its state."""
    if not isinstance(state, AdaptiveAllReduce):
        raise TypeError(f"the state of adaptive_all_reduce_hook is {state!r}, expected an AdaptiveAllReduce")
    return state.reduce_bucket(bucket)


def _reduce(channel: Channel, buffer: torch.Tensor, group, future: torch.futures.Future, launched: bool) -> None:
    problem = None
    try:
        with torch.no_grad():
            channel.all_reduce(buffer, group)
    except BaseException as error:
        problem = error
    if launched:
        statistics.note_landing()
    future.set_result(buffer) if problem is None else future.set_exception(problem)


class _ReduceScatter:
    """What FSDP2 calls instead of its own reduce-scatter: the protocol of ``set_custom_reduce_scatter``."""

    def __init__(self, channel: Channel, prepare: Callable[[], None]):
        self.channel, self.prepare = channel, prepare

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor, input_tensor, group, op, async_op=False):
        _check_device(input_tensor)
        self.prepare()
        with torch.no_grad():
            self.channel.reduce_scatter(output_tensor, input_tensor, group, op)


def _check_device(gradient: torch.Tensor) -> None:
    if not has_kernels(gradient.device.type):
        raise RuntimeError(
            f"a gradient is on {gradient.device}, and this build of torch_sluice has no kernels to measure it there"
        )
