"""The accumulate operators against torch: values, statistics, memory layouts, tracing, bad input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.devices import DEVICES, INDUCTOR

from torch_sluice.accumulate import operators
from torch_sluice.accumulate.operators import BLOCK, STATS, count_blocks

ops = torch.ops.sluice
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def new_sum(like, dtype):
    """An accumulator with the layout of ``like`` and its exponents, both full of rubbish."""
    accumulator = torch.full_like(like, torch.nan, dtype=dtype)
    exponents = None
    if dtype == torch.float16:
        exponents = torch.full((count_blocks(like.numel()),), 77, dtype=torch.int8, device=like.device)
    return accumulator, exponents


def read(accumulator, exponents, scale=1.0, dtype=torch.float32):
    out = torch.full_like(accumulator, torch.nan, dtype=dtype)
    ops.read_accumulator(accumulator, exponents, scale, out)
    return out


def relative_error(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


shapes = st.lists(st.integers(0, 5), max_size=3) | st.lists(st.integers(1, 3000), min_size=1, max_size=1)


@settings(max_examples=40)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from([torch.float32, torch.float16]), st.booleans(), st.integers(0))
def test_sums_are_those_of_torch(shape, grad_dtype, dtype, stochastic, seed):
    generator = torch.Generator().manual_seed(seed % 2**31)
    grads = [torch.randn(shape, generator=generator).to(grad_dtype) for _ in range(3)]
    accumulator, exponents = new_sum(grads[0], dtype)
    expected, magnitude = torch.zeros(shape), torch.zeros(shape)
    for step, grad in enumerate(grads):
        rounding = step + seed % 2**40 if stochastic else None
        stats = ops.accumulate_(accumulator, exponents, grad, 0.25, step == 0, rounding)
        expected, magnitude = expected + 0.25 * grad.float(), magnitude + 0.25 * grad.float().abs()
        magnitudes = grad.double().abs()
        assert stats.shape == (STATS,)
        torch.testing.assert_close(stats[0], magnitudes.square().sum(), rtol=1e-6, atol=0)
        assert stats[1] == (magnitudes.max() if magnitudes.numel() else 0)
        assert stats[2] == 0
    got = read(accumulator, exponents)
    if dtype == torch.float32:
        assert torch.equal(got, expected)
    else:  # three roundings, each within 2^-10 of what was there, or 2^-38 of the block's largest
        assert ((got - expected).abs() <= 3 * 2**-10 * magnitude + 2**-36 * 4).all()


def test_float32_without_scale_has_the_bits_of_add():
    grads = torch.randn(4, 70001)
    accumulator, expected = torch.zeros(70001), torch.zeros(70001)
    for grad in grads:
        ops.accumulate_(accumulator, None, grad, 1.0, False, None)
        expected.add_(grad)
    assert torch.equal(accumulator, expected)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16])
def test_scaled_float16_is_good_where_a_cast_is_not(grad_dtype):
    grad = (torch.randn(200_000) * 1e-7).to(grad_dtype)
    accumulator, exponents = new_sum(grad, torch.float16)
    ops.accumulate_(accumulator, exponents, grad, 1.0, True, 1)
    assert relative_error(read(accumulator, exponents), grad.double()) < 3e-4
    assert relative_error(grad.half(), grad.double()) > 3e-2


def test_reading_scales_and_rounds_as_torch_does():
    grad = torch.randn(5000)
    accumulator, exponents = new_sum(grad, torch.float32)
    ops.accumulate_(accumulator, exponents, grad, 1.0, True, None)
    for dtype in DTYPES:
        out = torch.empty(5000, dtype=dtype)
        stats = ops.read_accumulator(accumulator, None, 1 / 3, out)
        assert torch.equal(out, (grad * torch.tensor(1 / 3)).to(dtype))
        torch.testing.assert_close(stats[0], out.double().square().sum(), rtol=1e-6, atol=0)
    ops.read_accumulator(accumulator, None, 0.5, accumulator)
    assert torch.equal(accumulator, grad / 2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_layout_of_gradient_and_out(dtype, device):
    base = torch.randn(6, 5, 4, 3, device=device)
    accumulator, exponents = new_sum(base.to(memory_format=torch.channels_last), dtype)
    grads = {
        "same": base.to(memory_format=torch.channels_last),
        "contiguous": base,
        "transposed": base.transpose(0, 1).contiguous().transpose(0, 1),
        "strided": torch.randn(6, 5, 4, 6, device=device)[..., ::2].copy_(base),
        "offset": torch.randn(1 + base.numel(), device=device)[1:].view_as(base).copy_(base),
        "expanded": torch.ones(1, 5, 1, 1, device=device).expand(6, 5, 4, 3),
    }
    results = {}
    for name, grad in grads.items():
        ops.accumulate_(accumulator, exponents, grad, 1.0, True, None)
        other = torch.empty(4, 3, 6, 5, device=device).permute(2, 3, 0, 1)
        for out in (torch.empty_like(accumulator, dtype=torch.float32), other):
            ops.read_accumulator(accumulator, exponents, 1.0, out)
            results.setdefault(name, out.clone())
            torch.testing.assert_close(out, grad, rtol=1e-3, atol=0)
        stats = ops.measure_gradient(grad)
        torch.testing.assert_close(stats[0], grad.double().square().sum(), rtol=1e-6, atol=0)
    assert torch.equal(results["same"], results["transposed"])


def test_a_sum_goes_from_float16_to_float32_without_loss():
    grad = torch.randn(3000) * 1e-8
    half, exponents = new_sum(grad, torch.float16)
    ops.accumulate_(half, exponents, grad, 1.0, True, 3)
    single = read(half, exponents)
    ops.accumulate_(half, exponents, single, -1.0, False, None)
    assert read(half, exponents).count_nonzero() == 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_not_finite_is_counted_and_kept(dtype, device):
    grad = torch.randn(2500, device=device)
    grad[3], grad[1100], grad[2000] = torch.nan, torch.inf, -torch.inf
    accumulator, exponents = new_sum(grad, dtype)
    stats = ops.accumulate_(accumulator, exponents, grad, 1.0, True, 1)
    kept = grad[grad.isfinite()].double()
    assert stats[2] == 3
    assert stats[1] == kept.abs().max()
    assert stats[3] == torch.inf
    torch.testing.assert_close(stats[0], kept.square().sum(), rtol=1e-6, atol=0)
    got = read(accumulator, exponents)
    assert torch.equal(got.isnan(), grad.isnan())
    assert torch.equal(got.isinf(), grad.isinf())
    torch.testing.assert_close(got, grad, rtol=1e-3, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_bits_again_and_with_any_number_of_threads(device):
    grad = torch.randn(300_001, device=device)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 1, 3):
            torch.set_num_threads(count)
            accumulator, exponents = new_sum(grad, torch.float16)
            stats = ops.accumulate_(accumulator, exponents, grad, 1.0, True, 5)
            results.append((accumulator, exponents, stats))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_another_seed_rounds_differently_and_as_well():
    grad = torch.randn(100_000)
    sums = []
    for seed in (1, 2):
        accumulator, exponents = new_sum(grad, torch.float16)
        ops.accumulate_(accumulator, exponents, grad, 1.0, True, seed)
        sums.append(read(accumulator, exponents))
    assert 0.3 < (sums[0] != sums[1]).float().mean() < 0.7
    mean = (sums[0] + sums[1]) / 2  # errors of the two are independent
    assert 0.6 < relative_error(mean, grad.double()) / relative_error(sums[0], grad.double()) < 0.8


def samples(device="cpu"):
    grad = torch.randn(3, 700, device=device)
    half, exponents = torch.randn(3, 700, device=device).half(), torch.zeros(3, dtype=torch.int8, device=device)
    return {
        "accumulate_": [
            (torch.randn(3, 700, device=device), None, grad, 1.0, False, None),
            (half, exponents, grad.bfloat16(), 0.5, False, 7),
            (half, exponents, grad.t().contiguous().t(), 0.5, True, None),
        ],
        "measure_gradient": [(grad,), (grad.half(),)],
        "read_accumulator": [
            (half, exponents, 0.5, torch.empty(3, 700, device=device)),
            (grad, None, 2.0, half.clone()),
        ],
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", samples())
def test_opcheck(name, device):
    operator = getattr(ops, name).default
    for arguments in samples(device)[name]:
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=INDUCTOR)])
def test_the_operators_trace_into_a_whole_graph(backend, device):
    torch._dynamo.reset()

    def step(accumulator, exponents, grad):
        ops.accumulate_(accumulator, exponents, grad * 2, 1.0, False, 3)
        out = torch.empty_like(grad)
        stats = ops.read_accumulator(accumulator, exponents, 0.5, out)
        return out, stats

    grad = torch.randn(2000, device=device)
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend=backend)):
        half, exponents = (torch.zeros(n, dtype=t, device=device) for n, t in ((2000, torch.float16), (2, torch.int8)))
        results.append((*function(half, exponents, grad), half, exponents))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


single, half = torch.zeros(1500), torch.zeros(1500).half()
exponents = torch.zeros(2, dtype=torch.int8)
grad = torch.ones(1500)
BAD = {
    "grad of another shape": (
        lambda ops: ops.accumulate_(single, None, grad[:7], 1.0, False, None),
        r"grad is float32 \[7\] on cpu, expected the shape of the accumulator, which is float32 \[1500\] on cpu",
    ),
    "grad of another rank": (
        lambda ops: ops.accumulate_(single, None, grad[None], 1.0, False, None),
        r"grad is float32 \[1, 1500\] on cpu, expected the shape of the accumulator",
    ),
    "grad in float64": (
        lambda ops: ops.accumulate_(single, None, grad.double(), 1.0, False, None),
        r"grad is float64 \[1500\] on cpu, expected float32, bfloat16 or float16",
    ),
    "grad of integers": (
        lambda ops: ops.measure_gradient(torch.arange(3)),
        r"grad is int64 \[3\] on cpu, expected float32, bfloat16 or float16",
    ),
    "accumulator in bfloat16": (
        lambda ops: ops.accumulate_(single.bfloat16(), None, grad, 1.0, False, None),
        r"accumulator is bfloat16 \[1500\] on cpu, expected float32 or float16",
    ),
    "accumulator with gaps": (
        lambda ops: ops.accumulate_(torch.zeros(3000)[::2], None, grad, 1.0, False, None),
        r"accumulator is float32 \[1500\] on cpu with gaps or overlaps in its memory",
    ),
    "accumulator with overlaps": (
        lambda ops: ops.accumulate_(torch.zeros(1).expand(1500), None, grad, 1.0, False, None),
        r"accumulator is float32 \[1500\] on cpu with gaps or overlaps in its memory",
    ),
    "exponents missing": (
        lambda ops: ops.accumulate_(half, None, grad, 1.0, False, None),
        r"exponents is None, expected int8 exponents with a float16 accumulator",
    ),
    "exponents too many": (
        lambda ops: ops.accumulate_(single, exponents, grad, 1.0, False, None),
        r"exponents are given with a float32 accumulator, expected None",
    ),
    "exponents too few": (
        lambda ops: ops.read_accumulator(half, exponents[:1], 1.0, grad.clone()),
        r"exponents is int8 \[1\] on cpu, expected contiguous int8 \[ceil\(numel / 1024\)\] = \[2\]",
    ),
    "exponents of another dtype": (
        lambda ops: ops.accumulate_(half, exponents.int(), grad, 1.0, False, None),
        r"exponents is int32 \[2\] on cpu, expected contiguous int8",
    ),
    "grad_scale not finite": (
        lambda ops: ops.accumulate_(single, None, grad, float("nan"), False, None),
        r"grad_scale is nan, expected a number that is finite in float32",
    ),
    "scale too large": (
        lambda ops: ops.read_accumulator(single, None, 1e300, grad.clone()),
        r"scale is 1e\+300, expected a number that is finite in float32",
    ),
    "out of another shape": (
        lambda ops: ops.read_accumulator(single, None, 1.0, grad[:3].clone()),
        r"out is float32 \[3\] on cpu, expected the shape of the accumulator",
    ),
    "out in float64": (
        lambda ops: ops.read_accumulator(single, None, 1.0, grad.double()),
        r"out is float64 \[1500\] on cpu, expected float32, bfloat16 or float16",
    ),
}


# The operators themselves raise what torch makes of a std::invalid_argument: from 2.15 on, a RuntimeError.
FACES = {"operators": (ops, (ValueError, RuntimeError)), "python": (operators, ValueError)}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, face):
    call, message = BAD[name]
    functions, errors = FACES[face]
    with pytest.raises(errors, match=message):
        call(functions)
    assert not single.any()
    assert not half.any()


def test_another_error_stays_what_it_is():
    """Only what the library says about an argument becomes a ValueError."""
    with torch.inference_mode():
        sums = torch.zeros(3)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode") as caught:
        operators.accumulate_(sums, None, torch.ones(3), 1.0, False, None)
    assert not isinstance(caught.value, ValueError)


WRONG_DEVICE = {
    "grad": lambda ops: ops.accumulate_(single, None, grad.to("meta"), 1.0, False, None),
    "exponents": lambda ops: ops.accumulate_(half, exponents.to("meta"), grad, 1.0, False, None),
    "out": lambda ops: ops.read_accumulator(single, None, 1.0, grad.to("meta")),
}


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("name", WRONG_DEVICE)
def test_meta_beside_cpu_is_named(name, face):
    message = f"{name} is on meta, expected the device of accumulator, which is cpu"
    with pytest.raises(ValueError, match=message):
        WRONG_DEVICE[name](FACES[face][0])


def test_fake_tensors_meet_the_same_checks():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        fake, fake_grad = torch.empty(1500), torch.empty(7)
        with pytest.raises(ValueError, match=r"grad has shape \[7\], expected that of the accumulator"):
            ops.accumulate_(fake, None, fake_grad, 1.0, False, None)
        with pytest.raises(ValueError, match="exponents is absent with a torch.float16 accumulator"):
            ops.accumulate_(fake.half(), None, fake, 1.0, False, None)
        with pytest.raises(ValueError, match=r"exponents has shape \[1\], expected \[2\]"):
            ops.read_accumulator(fake.half(), torch.empty(1, dtype=torch.int8), 1.0, fake)
        with pytest.raises(ValueError, match="accumulator is torch.float64, expected float32 or float16"):
            ops.read_accumulator(fake.double(), None, 1.0, fake)
        with pytest.raises(ValueError, match="grad is torch.float64, expected float32, bfloat16 or float16"):
            ops.measure_gradient(fake.double())


def test_the_constants_are_those_of_the_header(repository):
    header = (repository / "ops/sluice/accumulate.h").read_text()
    assert f"#define SL_ACCUMULATE_BLOCK {BLOCK}\n" in header
    assert f"#define SL_ACCUMULATE_STATS {STATS}\n" in header


@pytest.mark.gpu
@pytest.mark.parametrize("grad_dtype", DTYPES)
def test_a_gpu_gives_the_bits_of_the_cpu(grad_dtype):
    grads = [torch.randn(50_003).to(grad_dtype) for _ in range(3)]
    for dtype in (torch.float32, torch.float16):
        on_cpu, on_gpu = new_sum(grads[0], dtype), new_sum(grads[0], dtype)
        on_gpu = tuple(tensor if tensor is None else tensor.cuda() for tensor in on_gpu)
        for step, one in enumerate(grads):
            expected = ops.accumulate_(*on_cpu, one, 0.3, step == 0, step)
            stats = ops.accumulate_(*on_gpu, one.cuda(), 0.3, step == 0, step)
            torch.testing.assert_close(stats.cpu(), expected, rtol=1e-5, atol=0)
        assert torch.equal(on_gpu[0].cpu(), on_cpu[0])
        out = torch.empty(50_003, device="cuda")
        ops.read_accumulator(*on_gpu, 1 / 3, out)
        assert torch.equal(out.cpu(), read(*on_cpu, 1 / 3))
