"""The peak that MFU is a share of: what this machine's matrix multiply reaches, measured and not looked up."""

import contextlib
import functools
import time
import warnings
from collections.abc import Callable, Iterator

import torch

from torch_sluice.monitor.records import own_work


def measure_peak_flops(
    dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", seconds: float = 0.6
) -> float:
    """FLOP/s of a large square matrix product with torch's current number of threads: the best of several batches.

    A product of two n x n matrices counts 2 n^3 operations. n is 1024 on a CPU, 8192 elsewhere, and less where such a
    product would take longer than ``seconds``. int8 is the best of torch's int8 products: ``torch._int_mm`` and, on a
    CPU, the quantised linear layer of its engine (FBGEMM).

    Raises:
        ValueError: torch has no matrix product of this dtype on this device.
    """
    device = torch.device(device)
    best, problem = 0.0, None
    for make in _PRODUCTS.get(dtype, (_matrix_product,)):
        try:
            best = max(best, _measure(lambda n, make=make: make(n, dtype, device), device, seconds))
        except (RuntimeError, NotImplementedError) as error:
            problem = error
    if not best:
        raise ValueError(f"dtype is {dtype} on {device}, of which torch has no matrix product") from problem
    return best


_known_peaks: dict[tuple[torch.dtype, torch.device, int], float] = {}


def peak_flops_of(dtype: torch.dtype, device: torch.device) -> float:
    """``measure_peak_flops``, once in a process for each dtype, device and number of threads."""
    key = dtype, device, torch.get_num_threads()
    if key not in _known_peaks:
        with own_work():
            _known_peaks[key] = measure_peak_flops(dtype, device)
    return _known_peaks[key]


def is_peak_known(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether ``peak_flops_of`` has nothing to measure."""
    return (dtype, device, torch.get_num_threads()) in _known_peaks


def _measure(make: Callable, device: torch.device, seconds: float) -> float:
    def time_product(product) -> float:
        start = time.perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    with torch.no_grad(), _no_modes():
        n = 1024 if device.type == "cpu" else 8192
        small = make(n // 4)
        time_product(small)
        if 64 * time_product(small) > seconds:
            n //= 4
        product = make(n)
        time_product(product)
        best, end = time_product(product), time.perf_counter() + seconds
        while time.perf_counter() < end:
            best = min(best, time_product(product))
    return 2.0 * n**3 / best


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    """Autocast would change what is measured."""
    with torch.autocast("cpu", enabled=False), contextlib.ExitStack() as stack:
        if torch.cuda.is_available():
            stack.enter_context(torch.autocast("cuda", enabled=False))
        yield


def _operands(n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Random numbers of its own: whoever is watched draws the same ones with and without a monitor.
    generator = torch.Generator(device).manual_seed(n)
    make = functools.partial(torch.randn, n, n, generator=generator, device=device)
    return make(), make()


def _matrix_product(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = (operand.to(dtype) for operand in _operands(n, device))
    out = torch.empty(n, n, dtype=dtype, device=device)
    return lambda: torch.mm(left, right, out=out)


def _int8_product(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = ((40 * operand).clamp(-127, 127).to(torch.int8) for operand in _operands(n, device))
    return lambda: torch._int_mm(left, right)


def _int8_engine(n: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    if device.type != "cpu":
        raise NotImplementedError("torch's quantised engines run on a CPU")
    left, right = _operands(n, device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch means to drop its quantised tensors, and has them still
        packed = torch.ops.quantized.linear_prepack(torch.quantize_per_tensor(right, 0.05, 0, torch.qint8), None)
    return lambda: torch.ops.quantized.linear_dynamic(left, packed, reduce_range=True)


_PRODUCTS = {torch.int8: (_int8_product, _int8_engine)}
