"""The mode under which a step runs so that its operations are counted."""

import functools
import threading
import weakref
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _python_dispatch as dispatch
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from torch_sluice.monitor import formulas
from torch_sluice.monitor.flops import FlopCount
from torch_sluice.monitor.limits import warn
from torch_sluice.monitor.operators import computes, qualified_name
from torch_sluice.monitor.torch_formulas import FORMULAS, IN_INT8, Call

_DENSE_LAYOUTS = (torch.strided, torch._mkldnn, torch.jagged)


class StepFlopCounter(dispatch.TorchDispatchMode):
    """``with StepFlopCounter() as counter: step()``, then ``counter.count``. Works around compiled models too.

    It sees the operators of the thread in which it was begun, and of the backward passes that start there. It may be
    ended out of order, or never: one that is over counts nothing, and the next one in the thread takes it away.
    """

    supports_higher_order_operators = True

    def __init__(self):
        super().__init__()
        self.count = FlopCount()
        self.over = False
        self._pairs = formulas.PairCache()
        self._thread = None  # in which it began
        self._met = 0  # operators that compute
        self._within = 0  # operators that tensors are handling themselves
        self._passed_on = None  # the last of them, until the tensors have it

    @classmethod
    def begin_alone(cls, owner: object) -> "StepFlopCounter | None":
        """A counter that has begun, and that is over when its owner is no more; None where another thread is counting:
        the flags that torch has of its modes are those of the process, and two that overlapped would leave them wrong.
        """
        with _counting.lock:
            if _counting.is_elsewhere():
                return None
            counter = cls().__enter__()
        weakref.finalize(owner, counter._finish).atexit = False
        return counter

    def __enter__(self) -> "StepFlopCounter":
        _remove(lambda mode: isinstance(mode, StepFlopCounter) and mode.over)
        self._thread = _counting.begin()
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        """Again, it does nothing."""
        self._finish()
        if dispatch._get_current_dispatch_mode() is self:
            super().__exit__(*exception)
        else:  # others were begun since, or this is another thread, or it was taken off
            _remove(lambda mode: mode is self)

    def _finish(self) -> None:
        if not self.over:
            self.over = True
            _counting.end(self._thread)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(operator, torch._ops.HigherOrderOperator):
            return self._run_higher_order(operator, args, kwargs)
        if operator in _ABOUT_SIZES:
            return NotImplemented  # tensors of jagged sizes answer these themselves
        if operator is torch.ops.prim.device.default:
            return operator(*args, **kwargs)
        if any(map(_handles_operators, types)):
            passed_on, self._passed_on = self._passed_on, None
            return NotImplemented if passed_on is operator else self._run_subclass(operator, args, kwargs)
        # A nested tensor has kernels of its own for what is otherwise put together of other operators.
        if not any(isinstance(value, torch.Tensor) and value.is_nested for value in args):
            with self._again():
                out = operator.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = operator(*args, **kwargs)
        self._tally(operator, args, kwargs, out)
        return out

    def _run_subclass(self, operator, args, kwargs):
        """A tensor that handles operators itself, as a ``DTensor``: what it runs is counted, on this rank; where
        nothing of that is to be seen, the operator is."""
        met, self._passed_on = self._met, operator
        self._within += 1
        try:
            with self._again():
                out = operator(*args, **kwargs)
        finally:
            self._within -= 1
            self._passed_on = None
        if self._met == met:
            self._tally(operator, args, kwargs, out)
        return out

    def _again(self):
        """Puts this mode, which is off while it handles an operator, back into place."""
        return _Reentered(self)

    def _run_higher_order(self, operator, args, kwargs):
        """Operators that take functions, as ``cond``: what the functions run is counted, unless there is a formula."""
        has_formula = operator in flop_registry
        seen = False

        def follow(function):
            def run(*args, **kwargs):
                with self._again():
                    return function(*args, **kwargs)

            nonlocal seen
            seen = True
            return run

        if not has_formula:
            args, kwargs = tree_map_only(_is_function, follow, (args, kwargs))
        out = operator(*args, **kwargs)
        if has_formula:
            self._attempt(operator, lambda: flop_registry[operator](*args, **kwargs, out_val=out), args)
        elif not seen:
            self._miss(_name_of_kernel(operator, kwargs))
        return out

    def _tally(self, operator, args, kwargs, out) -> None:
        if self.over or (self._within and any(isinstance(value, FakeTensor) for value in tree_leaves(args))):
            return  # or a tensor that handles operators itself works out what shape it will have
        try:
            formula = self._find(operator, args, kwargs, out)
        except Exception as error:
            return self._miss(qualified_name(operator), str(error))
        if formula is not None:
            self._attempt(operator, formula, args)
        elif computes(operator):
            self._miss(qualified_name(operator))

    def _miss(self, name: str, why: str = "") -> None:
        self._met += 1
        self.count.unknown.setdefault(name, why)

    def _find(self, operator, args, kwargs, out) -> Callable[[], int | tuple[int, int]] | None:
        """The operator's formula, ready to be asked; in this order: ours, torch's, those of operators in place."""
        packet, name = operator._overloadpacket, qualified_name(operator)
        if packet in formulas.GATED:
            kwargs = {**kwargs, "pairs": self._pairs, "out_val": out}
        elif packet in formulas.OVERRIDES:
            kwargs = {**kwargs, "out_val": out}
        if packet in formulas.OVERRIDES:
            return functools.partial(formulas.OVERRIDES[packet], *args, **kwargs)
        plain = name.removesuffix("_")
        for key in (name, plain):
            own = FORMULAS.get(key) or IN_INT8.get(key)
            if own is not None:
                return lambda: own(Call(operator, args, kwargs, out))
        for known in (packet, _plain_packet(plain)):
            if known in flop_registry:
                return functools.partial(flop_registry[known], *args, **kwargs, out_val=out)
        return None

    def _attempt(self, operator, formula, args) -> None:
        """Adds what the formula gives. Its failure must not become one of the operator's, in the midst of the model."""
        try:
            if any(isinstance(x, torch.Tensor) and x.layout not in _DENSE_LAYOUTS for x in tree_leaves(args)):
                raise ValueError("a tensor is sparse")
            operations = formula()
        except Exception as error:
            self._miss(qualified_name(operator), str(error) or type(error).__name__)
            return
        self._met += 1
        executed, dense = operations if isinstance(operations, tuple) else (operations, operations)
        packet = getattr(operator, "_overloadpacket", operator)
        if packet in formulas.GATED:
            self.count.gated += executed
            self.count.gated_dense_equivalent += dense
        dtype = "int8" if qualified_name(operator) in IN_INT8 else formulas.dtype_name(packet, args)
        self.count.executed += executed
        self.count.dense_equivalent += dense
        self.count.by_dtype[dtype] += executed


class _Counting:
    """Who is counting, by threads. While anybody is, compiled models run as they were written: what a compiler fuses
    cannot be seen, and a model that must be compiled whole (``fullgraph=True``) fails under a mode."""

    def __init__(self):
        self.lock, self._threads, self._stance = threading.RLock(), [], None

    def is_elsewhere(self) -> bool:
        others = {thread.ident for thread in threading.enumerate()} - {threading.get_ident()}
        return not others.isdisjoint(self._threads)

    def begin(self) -> int:
        with self.lock:
            self._threads.append(threading.get_ident())
            if len(self._threads) == 1:
                self._stance = torch.compiler.set_stance("force_eager")
        return threading.get_ident()

    def end(self, thread: int) -> None:
        with self.lock:
            self._threads.remove(thread)
            if not self._threads:
                self._stance.__exit__(None, None, None)


_counting = _Counting()


class _Reentered:
    """A mode once more on top, without the begin and end of its own."""

    def __init__(self, mode: StepFlopCounter):
        self._mode = mode

    def __enter__(self) -> None:
        dispatch.TorchDispatchMode.__enter__(self._mode)

    def __exit__(self, *exception) -> None:
        dispatch.TorchDispatchMode.__exit__(self._mode, *exception)


def _remove(is_unwanted: Callable[[dispatch.TorchDispatchMode], bool]) -> None:
    """Takes modes off this thread's stack, wherever they are. torch itself only takes the last one off."""
    stack = dispatch._get_current_dispatch_mode_stack()
    first = next((place for place, mode in enumerate(stack) if is_unwanted(mode)), None)
    if first is None:
        return
    # Modes remember what torch's flags were before them, so all that came later go and come back.
    for mode in reversed(stack[first:]):
        dispatch.TorchDispatchMode.__exit__(mode, None, None, None)
    for mode in stack[first:]:
        if not is_unwanted(mode):
            dispatch.TorchDispatchMode.__enter__(mode)


def _handles_operators(kind: type) -> bool:
    """Whether tensors of the type answer operators by running others."""
    return kind.__torch_dispatch__ is not torch._C._disabled_torch_dispatch_impl and not issubclass(kind, FakeTensor)


def _is_function(value) -> bool:
    return callable(value) and not isinstance(value, (torch.Tensor, type, torch._ops.OperatorBase))


def _name_of_kernel(operator, kwargs: dict) -> str:
    """A Triton kernel's own name; else the operator's."""
    if "kernel_idx" in kwargs:
        from torch._higher_order_ops.triton_kernel_wrap import get_kernel

        kernel = get_kernel(kwargs["kernel_idx"])
        while not hasattr(kernel, "__name__") and hasattr(kernel, "fn"):
            kernel = kernel.fn
        return f"triton::{getattr(kernel, '__name__', 'kernel')}"
    return qualified_name(operator)


def _plain_packet(qualified: str):
    """The operator of the name, if there is one: that of "aten::addmm_" without the underscore."""
    library, _, name = qualified.partition("::")
    return getattr(getattr(torch.ops, library), name, None)


_ABOUT_SIZES = frozenset(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        ("sym_is_contiguous", "default"),
        ("is_contiguous", "default"),
        ("is_contiguous", "memory_format"),
        ("is_strides_like_format", "default"),
        ("is_non_overlapping_and_dense", "default"),
        ("size", "default"),
        ("sym_size", "default"),
        ("stride", "default"),
        ("sym_stride", "default"),
        ("storage_offset", "default"),
        ("sym_storage_offset", "default"),
        ("numel", "default"),
        ("sym_numel", "default"),
        ("dim", "default"),
    )
    if hasattr(torch.ops.aten, name) and overload in getattr(torch.ops.aten, name).overloads()
) | {torch.ops.prim.layout.default}


@functools.cache
def load_counter() -> None:
    """Loads what torch loads at the first use of a mode, which is not the model's memory."""
    with StepFlopCounter():
        torch.mm(torch.zeros(1, 1), torch.zeros(1, 1))


def measure_flops(function: Callable[[], object]) -> FlopCount:
    """Runs the function once and returns the operations of its products, convolutions, attention, recurrent layers."""
    with StepFlopCounter() as counter:
        function()
    return counter.count


def count_flops(function: Callable[[], object]) -> int | None:
    """Runs the function once and returns the operations that it executed.

    Attention counts the pairs that are computed: half of them under a causal mask, the kept ones under a gate. Where an
    operator computes and has no formula, None, and a ``MonitorWarning`` that names it.
    """
    count = measure_flops(function)
    if count.unknown:
        warn(count.why_unknown())
        return None
    return count.executed
