"""The zoo's networks for images, [rows, 3, 32, 32], of the kinds that are in common use."""

import torch
from torch import nn
from torch.nn import functional


def _norm(inputs, outputs, kernel=3, stride=1, groups=1, activation=nn.ReLU):
    """Convolution, batch norm, activation."""
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm2d(outputs), activation() if activation else nn.Identity())


class Residual(nn.Module):
    """ResNet's bottleneck."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        middle = outputs // 2
        self.body = nn.Sequential(
            _norm(inputs, middle, 1), _norm(middle, middle, 3, stride), _norm(middle, outputs, 1, activation=None)
        )
        self.skip = _norm(inputs, outputs, 1, stride, activation=None)

    def forward(self, x):
        return (self.skip(x) + self.body(x)).relu()


class Inverted(nn.Module):
    """MobileNet's inverted residual; with squeeze and excitation it is EfficientNet's."""

    def __init__(self, inputs, outputs, stride, excite):
        super().__init__()
        wide = 4 * inputs
        self.expand, self.depthwise = _norm(inputs, wide, 1, activation=nn.SiLU), _norm(wide, wide, 3, stride, wide)
        self.reduce, self.restore = (nn.Conv2d(wide, 8, 1), nn.Conv2d(8, wide, 1)) if excite else (None, None)
        self.project = _norm(wide, outputs, 1, activation=None)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x):
        y = self.depthwise(self.expand(x))
        if self.reduce is not None:
            y = y * self.restore(functional.silu(self.reduce(y.mean((2, 3), keepdim=True)))).sigmoid()
        y = self.project(y)
        return x + y if self.adds else y


class Shuffled(nn.Module):
    """ShuffleNet's blocks: half of the channels pass, and both halves are interleaved."""

    def __init__(self, width, groups):
        super().__init__()
        half = width // 2
        self.groups = groups
        self.body = nn.Sequential(_norm(half, half, 1), _norm(half, half, 3, 1, half, None), _norm(half, half, 1))

    def forward(self, x):
        stay, y = x.chunk(2, 1)
        y = torch.cat([stay, self.body(y)], 1)
        n, c, h, w = y.shape
        return y.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Dense(nn.Module):
    """DenseNet: each layer reads all that came before."""

    def __init__(self, inputs=24, growth=16, layers=4):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs + i * growth), nn.ReLU(), nn.Conv2d(inputs + i * growth, growth, 3, 1, 1)
            )
            for i in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class UNet(nn.Module):
    """Down, and up again beside what was kept on the way down."""

    def __init__(self):
        super().__init__()
        self.first, self.down = _norm(3, 32), _norm(32, 64, 3, 2)
        self.middle, self.up = _norm(64, 64), nn.ConvTranspose2d(64, 32, 2, 2)
        self.last, self.head = _norm(64, 32), nn.Conv2d(32, 4, 1)

    def forward(self, x):
        x = self.first(x)
        y = self.up(self.middle(self.down(x)))
        return self.head(self.last(torch.cat([x, y], 1)))


class VisionTransformer(nn.Module):
    """Patches and a class token; q, k and v are fused, in order of heads or of q, k, v."""

    def __init__(self, by_head):
        super().__init__()
        self.by_head, self.patches = by_head, nn.Conv2d(3, 64, 8, 8)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 64)), nn.Parameter(torch.randn(1, 17, 64))
        self.norms = nn.ModuleList(nn.LayerNorm(64) for _ in range(4))
        self.qkv, self.out = (nn.ModuleList(nn.Linear(64, n) for _ in range(2)) for n in (192, 64))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(64, 192), nn.GELU(), nn.Linear(192, 64)) for _ in range(2))
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        b, n, _ = x.shape
        for i in range(2):
            y = self.qkv[i](self.norms[2 * i](x))
            if self.by_head:
                q, k, v = y.view(b, n, 4, 3, 16).permute(3, 0, 2, 1, 4)
            else:
                q, k, v = y.view(b, n, 3, 4, 16).permute(2, 0, 3, 1, 4)
            y = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, 64)
            x = x + self.out[i](y)
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return self.head(x[:, 0])


class ConvNeXt(nn.Module):
    """A depth-wise convolution, a norm over channels that are last, and an MLP with a scale."""

    def __init__(self, width=48):
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, 1, 3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(functional.gelu(self.up(y)))).permute(0, 3, 1, 2)


class Gathered(nn.Module):
    """Channels that are flipped, rolled and picked by a fixed index before the next layer reads them."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3)
        self.register_buffer("order", torch.randperm(32))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.second(self.first(x).relu().flip(1)).relu()
        x = self.third(x.roll(5, 1)).relu()
        return self.head(x[:, self.order].mean((2, 3)))


def _classifier(width: int, *blocks: nn.Module, stem: int = 24) -> nn.Module:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return nn.Sequential(_norm(3, stem, 3, 2), *blocks, pool)


def _plain() -> nn.Module:
    """VGG's kind: convolutions, pooling, and a flattening that linear layers read."""
    layers = [nn.Conv2d(3, 32, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(4), nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))


def enliven_batch_norms(model: nn.Module) -> None:
    """Batch norms that have seen data: statistics, scales and shifts that differ by channel."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)


MODELS = {
    "VGG": _plain,
    "ResNet": lambda: _classifier(64, Residual(24, 64, 2), Residual(64, 64, 1)),
    "MobileNet": lambda: _classifier(32, *(Inverted(i, o, s, False) for i, o, s in ((24, 32, 2), (32, 32, 1)))),
    "EfficientNet": lambda: _classifier(32, *(Inverted(i, o, s, True) for i, o, s in ((24, 32, 2), (32, 32, 1)))),
    "ShuffleNet": lambda: _classifier(32, Shuffled(32, 2), Shuffled(32, 4), stem=32),
    "DenseNet": lambda: _classifier(88, Dense()),
    "UNet": UNet,
    "ViT, qkv by head": lambda: VisionTransformer(True),
    "ViT, q, k, v": lambda: VisionTransformer(False),
    "ConvNeXt": lambda: _classifier(48, ConvNeXt(), ConvNeXt(), stem=48),
    "gathered channels": Gathered,
}
