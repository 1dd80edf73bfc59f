"""A small ResNet, defined and trained here, on handwritten digits: real scans, set into 32 x 32 pictures.

scikit-learn's digits are 1,797 scans of 8 x 8 pixels, on which any network is right 99 times in 100. Here each scan is
enlarged to 16 to 26 pixels, turned by up to 20 degrees, put somewhere in a picture of 32 x 32 and covered with noise:
the scans are real, their surroundings synthetic. Scans, not pictures, are dealt out to the parts.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.models.cache import train_once
from benchmarks.models.task import MissingPackageError, Task, call_batches, make_batches, targets_of

WIDTHS = (24, 48, 96, 192)
SIZE = 32
NOISE = 0.2  # standard deviation; a scan's darkest pixel is 1
PARTS = {"train": 1000, "selection": 297, "heldout": 500}  # scans
PICTURES = {"selection": 1, "heldout": 2}  # of each scan
BATCH = 8


class Block(nn.Module):
    """The basic residual block: two 3 x 3 convolutions beside an identity, or a 1 x 1 one where shapes change."""

    def __init__(self, inner: int, outer: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outer)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outer)
        self.shortcut = nn.Identity()
        if stride != 1 or inner != outer:
            self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-18 at 3/8 of its width (He et al., arXiv 1512.03385), for [B, 1, 32, 32]; returns logits [B, 10]."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=False)
        )
        blocks, inner = [], widths[0]
        for stage, width in enumerate(widths):
            blocks += [Block(inner, width, 1 if stage == 0 else 2), Block(width, width, 1)]
            inner = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inner, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def load_scans() -> dict[str, tuple[Tensor, Tensor]]:
    """Part -> (scans [N, 1, 8, 8] in [0, 1], classes int64 [N])."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingPackageError("the digits need scikit-learn: pip install 'torch-sluice[models]'") from error
    digits = load_digits()
    scans = torch.from_numpy(digits.images).float()[:, None] / 16
    classes = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(scans), generator=torch.Generator().manual_seed(0))
    places = order.split(list(PARTS.values()))
    return {part: (scans[place], classes[place]) for part, place in zip(PARTS, places, strict=True)}


def draw_pictures(scans: Tensor, generator: torch.Generator) -> Tensor:
    """A picture [N, 1, 32, 32] of each scan, at random size, angle and place, with noise."""
    count = len(scans)

    def uniform(low, high):
        return low + (high - low) * torch.rand(count, generator=generator)

    size, angle = uniform(16, 26) / SIZE, uniform(-0.35, 0.35)  # share of the picture's side; radians
    shift_x, shift_y = uniform(-1, 1) * (1 - size), uniform(-1, 1) * (1 - size)
    cos, sin = angle.cos() / size, angle.sin() / size
    # Where in the scan each point of the picture lies: x' = R (x - shift) / size.
    theta = torch.stack(
        [cos, -sin, -(cos * shift_x - sin * shift_y), sin, cos, -(sin * shift_x + cos * shift_y)], 1
    ).view(count, 2, 3)
    grid = F.affine_grid(theta, [count, 1, SIZE, SIZE], align_corners=False)
    pictures = F.grid_sample(scans, grid, align_corners=False)
    return pictures + NOISE * torch.randn(pictures.shape, generator=generator)


def loss_on_training_pictures(model: nn.Module, scans: tuple[Tensor, Tensor], step: int, size: int = 32) -> Tensor:
    """Cross entropy on pictures that the number of the step decides."""
    generator = torch.Generator().manual_seed(1000 + step)
    chosen = torch.randint(len(scans[0]), (size,), generator=generator)
    return F.cross_entropy(model(draw_pictures(scans[0][chosen], generator)), scans[1][chosen], label_smoothing=0.05)


def train(scans: tuple[Tensor, Tensor], steps: int, widths: tuple[int, ...] = WIDTHS) -> ResNet:
    """Trains by SGD with one cycle of its rate; the seed decides everything but the order of float additions."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = ResNet(widths)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps, pct_start=0.2)
    model.train()
    for step in range(steps):
        loss_on_training_pictures(model, scans, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


def accuracy(model, batches) -> float:
    """The share of pictures whose highest logit is the digit's."""
    return (call_batches(model, batches).argmax(-1) == targets_of(batches)).float().mean().item()


def load(quick: bool = False) -> Task:
    """The task; trains the model the first time (a cached file after that). ``quick``: less of everything."""
    scans = load_scans()
    steps, widths = (60, (8, 16)) if quick else (800, WIDTHS)
    model = ResNet(widths)
    recipe = f"digits 1: {widths} {steps} {NOISE} {PARTS}"
    model.load_state_dict(train_once("digits", recipe, lambda: train(scans["train"], steps, widths).state_dict()))
    batches = {}
    for seed, (part, pictures) in enumerate(PICTURES.items()):
        generator = torch.Generator().manual_seed(seed)
        images, classes = (tensor[: 64 if quick else None] for tensor in scans[part])
        drawn = torch.cat([draw_pictures(images, generator) for _ in range(1 if quick else pictures)])
        batches[part] = make_batches(drawn, classes.repeat(len(drawn) // len(classes)), BATCH)
    heldout = torch.cat([inputs for inputs, _ in batches["heldout"]])
    return Task(
        name="digits",
        title="ResNet-18 of 3/8 width, trained here on scikit-learn's digits set into noisy 32 x 32 pictures",
        metric_name="accuracy",
        model=model.eval(),
        selection=batches["selection"],
        heldout=batches["heldout"],
        metric=accuracy,
        draw_inputs=lambda batch: heldout[:batch].clone(),
        train_step=lambda model, step: loss_on_training_pictures(model, scans["train"], 10_000 + step),
        train_steps=20 if quick else 200,
        learning_rate=1e-3,
        notes=["digits: real scans, synthetic size, angle, place and noise; 1000 scans to train on, 500 held out"],
    )
