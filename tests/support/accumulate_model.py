"""What random programs train: a small model with heads that take turns, and each kind of optimizer."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

LR = 0.05
OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, LR),
    "momentum": lambda groups: torch.optim.SGD(groups, LR, momentum=0.9, foreach=False),
    "adamw": lambda groups: torch.optim.AdamW(groups, 1e-2, foreach=False),
    "foreach": lambda groups: torch.optim.AdamW(groups, 1e-2, foreach=True),
    "fused": lambda groups: torch.optim.AdamW(groups, 1e-2, fused=True),
}
LAYERS = ("trunk", "middle", "a", "b", "late")


class Net(nn.Module):
    """A trunk, a layer used any number of times, and three heads, of which the optimizer doesn't know ``late``."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(20, 64)  # 1280 elements: more than one block of a float16 sum
        self.middle = nn.Linear(64, 64)
        self.a, self.b, self.late = (nn.Linear(64, 4) for _ in range(3))

    def forward(self, x, heads, middle=1, reentrant=None):
        hidden = self.trunk(x).tanh()
        for _ in range(middle):
            if reentrant is None:
                hidden = self.middle(hidden).tanh()
            else:
                hidden = checkpoint(lambda h: self.middle(h).tanh(), hidden, use_reentrant=reentrant)
        return sum(getattr(self, head)(hidden).square().mean() for head in heads)


class Fail(torch.autograd.Function):
    """Nothing, and an OSError on the way back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise OSError("a backward pass that fails")
