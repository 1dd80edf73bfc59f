"""One rank of the benchmark of training steps: a model on one backend of torch.distributed.

The model is a stack of Llama-like blocks in plain torch. Data parallel: DistributedDataParallel. Tensor parallel: plans
of DTensor that cut heads and hidden units, with one all_reduce each after attention and MLP, forward and backward.
"""

import argparse
import json
import os
import time

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from benchmarks.collective_engines import begin_torch
from benchmarks.collective_rank import MARK, die_with_parent

HEAD = 64


class Attention(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden, bias=False) for _ in range(4))

    def forward(self, x):
        heads = (project(x).unflatten(-1, (-1, HEAD)).transpose(1, 2) for project in (self.query, self.key, self.value))
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        inner = hidden * 8 // 3 // HEAD * HEAD
        self.gate, self.up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, hidden: int):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention, self.mlp = Attention(hidden), Mlp(hidden)

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


def make_model(hidden: int, layers: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Block(hidden) for _ in range(layers)))


def cut_tensors(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """Tensor parallel over all ranks of the mesh."""
    whole = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Replicate(),))
    plan = {"attention": whole, "attention.out": RowwiseParallel(), "mlp": whole, "mlp.down": RowwiseParallel()}
    plan |= {f"attention.{name}": ColwiseParallel() for name in ("query", "key", "value")}
    plan |= {f"mlp.{name}": ColwiseParallel() for name in ("gate", "up")}
    for block in model:
        parallelize_module(block, mesh, plan)
    return model


def make_step(kind: str, backend: str, options):
    """The training step to time; returns its loss."""
    group = distributed.new_group(backend=backend)
    model = make_model(options.hidden, options.layers)
    if kind == "tensor":
        model = cut_tensors(model, DeviceMesh.from_group(group, "cpu"))
    else:
        model = nn.parallel.DistributedDataParallel(model, process_group=group)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(1 + (distributed.get_rank() if kind == "data" else 0))
    x = torch.randn(1, options.tokens, options.hidden)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def time_step(step, times: int) -> float:
    distributed.barrier()
    begin = time.perf_counter()
    for _ in range(times):
        step()
    return (time.perf_counter() - begin) / times


def main() -> None:
    die_with_parent()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", required=True, help="torch:BACKEND")
    parser.add_argument("--kind", choices=["data", "tensor"], required=True)
    for name in ("tokens", "hidden", "layers", "repeats"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    begin_torch(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), int(os.environ["MASTER_PORT"]))
    step = make_step(options.kind, options.peer.removeprefix("torch:"), options)
    losses = [step() for _ in range(3)]
    once = torch.tensor(time_step(step, 2))
    distributed.all_reduce(once, distributed.ReduceOp.MAX)
    times = max(1, round(0.05 / once.item()))
    slowest = torch.tensor([time_step(step, times) for _ in range(options.repeats)], dtype=torch.float64)
    distributed.all_reduce(slowest, distributed.ReduceOp.MAX)
    if distributed.get_rank() == 0:
        print(MARK + json.dumps({"seconds": slowest.tolist(), "losses": losses}), flush=True)
    distributed.barrier()
    os._exit(0)  # what is left of a backend's threads must not hold up the end


if __name__ == "__main__":
    main()
