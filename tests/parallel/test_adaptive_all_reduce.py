"""Gradients reduced in few bytes: within each format's error, alike on every rank, and training gets where it would."""

import hashlib
import io
import os
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from support.rank_pool import RankFailed, Ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torch_sluice
from torch_sluice.parallel import AdaptiveAllReduce, adaptive_all_reduce_hook
from torch_sluice.parallel.channel import Channel
from torch_sluice.parallel.compression import FORMATS, part_elements

POLICIES = ("float32", "bfloat16", "float16", "int8", "auto")


def digest(*tensors):
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def channel_of(policy, **options):
    return Channel(AdaptiveAllReduce(policy, **options)._options)


def group_of(backend):
    return None if backend == "sluice" else dist.new_group(backend=backend)


def normal(seed, elements, rank=None):
    generator = torch.Generator().manual_seed(1000 * seed + (dist.get_rank() if rank is None else rank))
    return torch.randn(elements, generator=generator)


# ---- one reduction


def reduce_once(backend):
    size, group, found = dist.get_world_size(), group_of(backend), []
    for elements in (size * 1024, 5001, 40_000):
        for name, relative, absolute in (("bfloat16", 2**-8, 0), ("float16", 2**-11, 2**-38), ("int8", 0, 1 / 254)):
            each = [1e-3 * 10**r * normal(elements, elements, r) for r in range(size)]
            channel, gradient = channel_of(name), each[dist.get_rank()].clone()
            channel.all_reduce(gradient, group)
            total = sum(g.double() for g in each)
            # One rounding of each gradient and one of the sum; absolute errors go with the largest of the block.
            terms = [*each, total]
            bound = sum(relative * t.abs() + absolute * t.abs().max() for t in terms) / size * 1.05
            assert ((gradient - total / size).abs() <= bound).all(), name
            assert gradient.ne(each[0]).any()
            assert channel.format == name
            ranks, message = size, FORMATS[name].message_bytes(part_elements(elements, size))
            assert channel.options.traffic.bytes_sent == (ranks - 1) * (2 * message + 7 * 8)
            assert channel.options.traffic.bytes_uncompressed == 2 * (ranks - 1) / ranks * 4 * elements
            found.append(digest(gradient))
    return found


@pytest.mark.parametrize("backend", ["sluice", "gloo"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_mean_is_within_the_error_of_its_format_and_the_same_on_every_rank(ranks, size, backend):
    by_rank = ranks(size).run(reduce_once, backend)
    assert all(found == by_rank[0] for found in by_rank)


def test_over_several_hosts(ranks):
    by_rank = ranks(3, hosts="aab").run(reduce_once, "sluice")
    assert by_rank[0] == by_rank[1] == by_rank[2]


def reduce_what_is_not_compressed():
    size = dist.get_world_size()
    for policy, dtype, elements in (
        *(("float32", torch.float32, 5000), ("int8", torch.float64, 5000), ("auto", torch.bfloat16, 1000)),
        *(("int8", torch.float32, size * 1024 - 1), ("int8", torch.float32, 0)),
    ):
        gradient = normal(1, elements).to(dtype)
        plain, channel = gradient.clone(), channel_of(policy)
        dist.all_reduce(plain)
        channel.all_reduce(gradient, None)
        assert gradient.equal(plain / size)
        assert channel.format == str(dtype).removeprefix("torch.")
    half = normal(2, 9000).to(torch.bfloat16)  # of bfloat16 parameters: the mean is rounded to them once more
    each = [normal(2, 9000, rank).to(torch.bfloat16).double() for rank in range(size)]
    channel_of("int8").all_reduce(half, None)
    torch.testing.assert_close(half.double(), sum(each) / size, atol=0.06, rtol=2**-7)


def test_small_buckets_and_other_dtypes_are_reduced_as_they_are(ranks):
    ranks(2).run(reduce_what_is_not_compressed)


# ---- over many steps


def deliver(policy, error_feedback, steps):
    """Gradients that are much alike from step to step, with elements far below the step of int8."""
    size, channel = dist.get_world_size(), channel_of(policy, error_feedback=error_feedback)
    elements = size * 1024 + 700
    steady = 1e-3 * normal(0, elements, 99)
    steady[::1024] = 1.0
    delivered, wanted = torch.zeros(elements, dtype=torch.float64), torch.zeros(elements, dtype=torch.float64)
    for step in range(steps):
        each = [steady + 1e-4 * normal(step + 1, elements, r) for r in range(size)]
        gradient = each[dist.get_rank()].clone()
        channel.all_reduce(gradient, None)
        delivered += gradient
        wanted += sum(g.double() for g in each) / size
    unsent = torch.zeros(elements) if channel.residual is None else channel.residual.clone()
    dist.all_reduce(unsent)
    return (wanted - delivered), unsent / size


def compare_feedback():
    for policy in ("int8", "float16", "bfloat16"):
        many, unsent = deliver(policy, True, 40)
        torch.testing.assert_close(many, unsent.double(), rtol=0, atol=2e-5)  # what is missing is what is unsent
        quantum = {"int8": 1 / 127, "float16": 2**-11, "bfloat16": 2**-8}[policy]
        assert many.abs().max() <= 2 * quantum
    small = torch.arange(2000) % 1024 != 0
    lost, unsent = deliver("int8", False, 40)
    kept, _ = deliver("int8", True, 40)
    assert unsent.eq(0).all()
    # Without feedback nothing of these elements ever arrives: the bias grows with the steps.
    assert lost[:2000][small].norm() > 10 * kept[:2000][small].norm()
    assert lost[:2000][small].abs().max() > 0.1


def test_error_feedback_bounds_what_is_missing_and_without_it_a_bias_grows(ranks):
    ranks(2).run(compare_feedback)


# ---- all ranks decide alike

KINDS = ("normal", "normal", "zeros", "nan", "infinite", "huge", "largest", "tiny", "denormal", "spikes", "wide")


def gradient_of(kind, generator, elements):
    x = torch.randn(elements, generator=generator)
    match kind:
        case "zeros":
            return torch.zeros(elements)
        case "nan" | "infinite":
            x[torch.randint(elements, (1,), generator=generator)] = float("nan" if kind == "nan" else "-inf")
        case "spikes":
            x = x * (torch.rand(elements, generator=generator) < 0.005)
        case "wide":
            x = x * torch.exp2(-45 * torch.rand(elements, generator=generator))
    return x * {"huge": 1e30, "largest": 8e37, "tiny": 1e-30, "denormal": 1e-41}.get(kind, 1.0)


def decide(backend, policy, rounds=50):
    size, group, channel = dist.get_world_size(), group_of(backend), channel_of(policy)
    same, found = torch.Generator().manual_seed(5), []
    for i in range(rounds):
        # Ten rounds each: every rank of a kind of its own; all of one kind.
        picks = torch.randint(len(KINDS), (size,), generator=same)
        kinds = [KINDS[p] for p in picks] if i // 10 % 2 == 0 else [KINDS[picks[0] if i > 20 else -2]] * size
        each = [gradient_of(k, torch.Generator().manual_seed(i * 10 + r), 6000) for r, k in enumerate(kinds)]
        gradient = each[dist.get_rank()].clone()
        channel.all_reduce(gradient, group)
        plain = sum(each)
        if not plain.isfinite().all():
            assert channel.format == "float32"
            torch.testing.assert_close(gradient.isnan(), plain.isnan())
            torch.testing.assert_close(gradient.isinf(), plain.isinf())
            finite = plain.isfinite()
            torch.testing.assert_close(gradient[finite], plain[finite] / size)  # nothing was added to it
        assert channel.residual is None or channel.residual.isfinite().all()
        found.append((channel.format, digest(gradient), channel.record.state_dict()))
    return found


@pytest.mark.parametrize(("backend", "policy"), [("sluice", "auto"), ("gloo", "auto"), ("sluice", "int8")])
def test_ranks_decide_alike_whatever_their_gradients_are(ranks, backend, policy):
    by_rank = ranks(3).run(decide, backend, policy)
    assert all(found == by_rank[0] for found in by_rank)
    formats = {format for format, *_ in by_rank[0]}
    assert formats == ({"int8", "float16", "bfloat16", "float32"} if policy == "auto" else {"int8", "float32"})


def resume_from_different_records():
    channel = channel_of("auto")
    if dist.get_rank() == 1:
        channel.record.load_state_dict({"level": 2, "calm": 0, "patience": 3})
    found = []
    for step in range(6):
        channel.all_reduce(normal(step, 5000), None)
        found.append((channel.format, channel.record.state_dict()))
    return found


def test_ranks_with_different_memories_agree_from_the_first_step_on(ranks):
    by_rank = ranks(2).run(resume_from_different_records)
    assert by_rank[0] == by_rank[1]
    assert [format for format, _ in by_rank[0]] == ["bfloat16"] * 2 + ["int8"] * 4


# ---- training


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8))


def batch(step, rank):
    x = normal(step, 32 * 32, rank).view(32, 32)
    return x, torch.sin(2 * x[:, :8]) + x[:, 8:16]


def train(model, call, steps=30, start=0):
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(start, start + steps):
        x, y = batch(step, dist.get_rank())
        optimizer.zero_grad()
        nn.functional.mse_loss(call(x), y).backward()
        optimizer.step()
    return model


def evaluate(call):
    x, y = batch(10_000, 0)
    with torch.no_grad():
        return nn.functional.mse_loss(call(x), y).item()


def wrap(state, group=None, **options):
    wrapped = DistributedDataParallel(make_model(), bucket_cap_mb=0.04, process_group=group, **options)
    if state is not None and group is not None:
        state.apply_to_ddp(wrapped)
    elif state is not None:
        wrapped.register_comm_hook(state, adaptive_all_reduce_hook)
    return wrapped


def train_with_ddp(backend, policies):
    group, results = group_of(backend), {}
    for policy in (None, *policies):
        state = policy and AdaptiveAllReduce(policy, timeout=timedelta(seconds=60))
        wrapped = wrap(state, group, gradient_as_bucket_view=policy == "int8")
        train(wrapped, wrapped)
        results[policy] = (evaluate(wrapped.module), digest(*wrapped.parameters()))
        if state is not None:
            assert state.formats.keys() == {f"bucket.{i}" for i in range(len(state.formats))}
            assert len(state.formats) > 1
            figures = state.figures()
            results[policy] += (figures["gradient_compression"], dict(state.traffic.formats))
            assert state.figures()["gradient_bytes_sent"] == 0
    return results


@pytest.mark.parametrize(("backend", "policies"), [("sluice", POLICIES), ("gloo", ("int8", "auto"))])
def test_ddp_reaches_the_loss_of_plain_ddp(ranks, backend, policies):
    by_rank = ranks(2).run(train_with_ddp, backend, policies)
    assert by_rank[0] == by_rank[1]
    start = evaluate(make_model())
    expected = by_rank[0].pop(None)[0]
    assert expected < 0.6 * start
    for policy, (loss, _, compression, formats) in by_rank[0].items():
        assert loss == pytest.approx(expected, rel=1e-3 if policy == "float32" else 0.05), policy
        # The smallest buckets stay as they are, and parts are filled up to whole blocks.
        smallest, largest = {"int8": (2.5, 4), "auto": (1.5, 4), "float32": (1, 1)}.get(policy, (1.5, 2))
        assert smallest <= compression <= largest, (policy, compression, formats)


def train_with_fsdp(policies):
    from torch.distributed.fsdp import fully_shard

    results = {}
    for policy in (None, *policies):
        model = make_model()
        for layer in (model[0], model[2], model[4]):
            fully_shard(layer)
        fully_shard(model)
        state = policy and AdaptiveAllReduce(policy)
        if state is not None:
            state.apply_to_fsdp(model)
        train(model, model)
        results[policy] = (evaluate(model), digest(*(p.full_tensor() for p in model.parameters())))
        if state is not None:
            assert state.formats.keys() == {"fsdp.0", "fsdp.2", "fsdp.4"}  # nothing is left for the root
            results[policy] += (state.figures()["gradient_compression"],)
            if policy != "float32":
                restored = AdaptiveAllReduce(policy)
                restored.apply_to_fsdp(model)
                restored.load_state_dict(state.state_dict())
                assert restored._modules["2"].residual.equal(state._modules["2"].residual)
    return results


def test_fsdp_reaches_the_loss_of_plain_fsdp(ranks):
    by_rank = ranks(2).run(train_with_fsdp, POLICIES)
    assert by_rank[0] == by_rank[1]
    expected = by_rank[0].pop(None)[0]
    for policy, (loss, _, compression) in by_rank[0].items():
        assert loss == pytest.approx(expected, rel=1e-5 if policy == "float32" else 0.05), policy
        smallest, largest = {"int8": (2.5, 4), "auto": (1.5, 4), "float32": (1, 1)}.get(policy, (1.5, 2))
        assert smallest <= compression <= largest, (policy, compression)


def spoil_one_gradient(policies):
    """An infinity on one rank reaches all, as with plain DDP, so that GradScaler skips the step everywhere."""
    for policy in policies:
        state = AdaptiveAllReduce(policy)
        wrapped = wrap(state)
        train(wrapped, wrapped, steps=2)
        x, y = batch(50, dist.get_rank())
        wrapped.zero_grad()
        scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=8.0), torch.optim.SGD(wrapped.parameters(), 1.0)
        loss, before = nn.functional.mse_loss(wrapped(x), y), digest(*wrapped.parameters())
        scaler.scale(loss * (float("inf") if dist.get_rank() == 1 else 1)).backward()
        assert not any(p.grad.isfinite().all() for p in wrapped.parameters())
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4
        assert digest(*wrapped.parameters()) == before
        train(wrapped, wrapped, steps=2)
        assert all(p.grad.isfinite().all() for p in wrapped.parameters())
        assert policy == "float32" or state.formats["bucket.1"] != "float32"


def test_a_gradient_that_is_not_finite_on_one_rank_is_seen_by_all(ranks):
    ranks(2).run(spoil_one_gradient, POLICIES)


def accumulate_and_skip():
    losses = {}
    for policy in (None, "int8"):
        state = policy and AdaptiveAllReduce(policy)
        wrapped = wrap(state)
        optimizer = torch.optim.AdamW(wrapped.parameters(), 3e-3)
        with torch_sluice.accumulate(wrapped, optimizer, every=3):
            for step in range(30):
                x, y = batch(step, dist.get_rank())
                nn.functional.mse_loss(wrapped(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
        losses[policy] = evaluate(wrapped.module)
        if state is not None:
            # One reduction a window. DDP lays out its buckets anew after the first, which may have fewer.
            buckets = len(state.formats)
            assert 9 * buckets < sum(state.traffic.formats.values()) <= 10 * buckets
            before = sum(state.traffic.formats.values())
            with wrapped.no_sync():
                wrapped(x).sum().backward()
            assert sum(state.traffic.formats.values()) == before
            wrapped(x).sum().backward()
            assert sum(state.traffic.formats.values()) == before + buckets
    assert losses["int8"] == pytest.approx(losses[None], rel=0.05)
    return losses


def test_with_accumulate_and_no_sync(ranks):
    by_rank = ranks(2).run(accumulate_and_skip)
    assert by_rank[0] == by_rank[1]


def resume():
    """Goes on from a checkpoint bit for bit, where buckets are the same from the first step on."""
    make = partial(wrap, find_unused_parameters=True)
    state, again = AdaptiveAllReduce("auto"), AdaptiveAllReduce("auto")
    wrapped = train(*[make(state)] * 2, steps=3)
    saved, weights = state.state_dict(), {k: v.clone() for k, v in wrapped.module.state_dict().items()}
    assert sum(piece.norm() for piece in saved["buckets"]["unsent"].values()) > 0
    torch.save(saved, buffer := io.BytesIO())
    train(wrapped, wrapped, steps=3, start=3)
    resumed = make(again)
    resumed.module.load_state_dict(weights)
    again.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    train(resumed, resumed, steps=3, start=3)
    assert digest(*resumed.parameters()) == digest(*wrapped.parameters())
    forgetful = make(AdaptiveAllReduce("auto"))
    forgetful.module.load_state_dict(weights)
    train(forgetful, forgetful, steps=3, start=3)
    assert digest(*forgetful.parameters()) != digest(*wrapped.parameters())


def test_training_goes_on_from_a_state(ranks):
    ranks(2).run(resume)


# ---- what goes wrong


def fail_in_the_thread():
    state = AdaptiveAllReduce("int8")
    wrapped = wrap(state)
    x, _ = batch(0, 0)

    def fail(gradient, group):
        raise ValueError("told to fail")

    state._buckets.channel = lambda index, parameters: type("Broken", (), {"all_reduce": staticmethod(fail)})
    with pytest.raises(RuntimeError, match="told to fail"):
        wrapped(x).sum().backward()


def test_what_fails_in_the_thread_fails_the_backward_pass(ranks):
    ranks(2).run(fail_in_the_thread)


def go_on_alone():
    wrapped = wrap(AdaptiveAllReduce("int8"))
    wrapped(batch(0, 0)[0]).sum().backward()
    dist.barrier()
    if dist.get_rank() == 1:
        os._exit(0)
    with pytest.raises(RuntimeError, match=r"sluice: rank 1 \(process \d+\)"):
        wrapped(batch(0, 0)[0]).sum().backward()


def test_a_rank_that_ends_fails_the_backward_pass_of_the_others():
    pool = Ranks(2)
    try:
        with pytest.raises(RankFailed) as failure:
            pool.run(go_on_alone)
        assert str(failure.value) == "rank 1: its process ended"
    finally:
        pool.close()


def test_bad_arguments():
    with pytest.raises(ValueError, match="policy is 'fp8', expected one of 'auto', 'int8', "):
        AdaptiveAllReduce("fp8")
    with pytest.raises(TypeError, match="error_feedback is 1, expected True or False"):
        AdaptiveAllReduce(error_feedback=1)
    with pytest.raises(ValueError, match=r"tolerance is -0\.1, expected a number above 0"):
        AdaptiveAllReduce(tolerance=-0.1)
    with pytest.raises(ValueError, match="tolerance is given with policy='int8', expected it with 'auto' only"):
        AdaptiveAllReduce("int8", tolerance=0.1)
    with pytest.raises(TypeError, match="process_group is 'world', expected a process group"):
        AdaptiveAllReduce(process_group="world")
    with pytest.raises(ValueError, match=r"no module of model is sharded, expected fully_shard\(\.\.\.\)"):
        AdaptiveAllReduce().apply_to_fsdp(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"timeout is 3, expected a datetime\.timedelta or None"):
        AdaptiveAllReduce(timeout=3)
    with pytest.raises(TypeError, match=r"grad_scaler is 2\.0, expected a torch\.amp\.GradScaler or None"):
        AdaptiveAllReduce(grad_scaler=2.0)
    with pytest.raises(TypeError, match="model is a Linear, expected a DistributedDataParallel"):
        AdaptiveAllReduce().apply_to_ddp(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="model is a int, expected a torch.nn.Module"):
        AdaptiveAllReduce().apply_to_fsdp(3)
    with pytest.raises(TypeError, match="the state of adaptive_all_reduce_hook is None, expected an AdaptiveAllReduce"):
        adaptive_all_reduce_hook(None, None)
    state = AdaptiveAllReduce().state_dict()
    for broken, message in (
        ({**state, "version": 2}, "the version of the state is 2, expected 1"),
        ([], "the version of the state is 'list', expected 1"),
        ({"version": 1, "modules": {}}, "the state lacks 'buckets'"),
        ({**state, "modules": {"layer": {}}}, "a module 'layer', which apply_to_fsdp"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptiveAllReduce().load_state_dict(broken)
