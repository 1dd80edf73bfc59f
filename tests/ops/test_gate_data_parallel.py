"""Controllers under data parallel training: the ranks agree on the density, and so on the push."""

import pytest
import torch
from support.ranks import run_ranks

PROGRAM = """
import sys, torch, torch_sluice
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch_sluice.attention import DensityController

distributed.init_process_group("gloo")
rank = distributed.get_rank()
model = torch_sluice.GatedAttention(8, 2, causal=True, window=2, target_density=0.2)
wrapped = DistributedDataParallel(model)
with torch.no_grad():  # the first rank keeps all pairs of three sequences, the second the window of one
    model.gate.query_bias.fill_(9.0 - 18.0 * rank)
controller = DensityController(wrapped, steps=10, gain=0.5, ramp=0.0, rows=0.0)
loss = wrapped(torch.randn(3 - 2 * rank, 32, 8)).square().mean()
controller.loss(loss).backward()
controller.step()
torch.save(controller.state_dict(), f"{sys.argv[1]}/{rank}.pt")
distributed.destroy_process_group()
"""


def test_ranks_agree_on_the_density_of_all_their_pairs(tmp_path):
    run_ranks(PROGRAM, 2, str(tmp_path))
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first == second
    pairs, near = 32 * 33 // 2, 63
    assert first["density"] == pytest.approx((3 * pairs + near) / (4 * pairs))
    assert first["strength"] == pytest.approx(0.5 * (first["density"] - 0.2))
