"""Groups that would pass for right with some numbers of units, and layers that stay: each is exact or named."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional

from torch_sluice.compress.calling import call_model, float_outputs
from torch_sluice.compress.graph import find_groups
from torch_sluice.compress.slicing import prune


class Model(nn.Module):
    """A forward over some layers."""

    def __init__(self, forward, **layers):
        super().__init__()
        self.run = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.run(self, x)


def run(model, inputs):
    with torch.no_grad():
        return float_outputs(call_model(model, inputs))[0]


def find(build, x):
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and tensor.is_floating_point():  # a norm that is constant would show nothing
                tensor.uniform_(0.5, 1.5) if "var" in name else tensor.add_(torch.rand_like(tensor))
    groups, notes = find_groups(model, x)
    return model, {group.name: group for group in groups}, notes


def change_by_order(model, group, x):
    """By how much the output moves when units change places in all that they are in: 0 where they are units."""
    order = list(range(group.width))
    random.Random(3).shuffle(order)
    other = copy.deepcopy(model)
    tensors = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    with torch.no_grad():
        for member in group.members:
            tensor, before = tensors[member.name], tensors[member.name].detach().clone()
            for unit, own in enumerate(member.indices):
                moved = before.index_select(member.dim, torch.tensor(member.indices[order[unit]]))
                tensor.index_copy_(member.dim, torch.tensor(own), moved)
    expected = run(model, x)
    return float((run(other, x) - expected).abs().max() / expected.abs().max())


def image(channels=3):
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def shuffled_groups():
    """A grouped convolution whose channels are shuffled for the next: one can't leave from one of the groups alone."""

    def forward(self, x):
        h = self.first(x).relu()
        n, c, height, width = h.shape
        h = h.view(n, 2, c // 2, height, width).transpose(1, 2).reshape(n, c, height, width)
        return self.last(self.second(h).relu())

    return Model(
        forward,
        first=nn.Conv2d(12, 24, 1, groups=2),
        second=nn.Conv2d(24, 12, 1, groups=2),
        last=nn.Conv2d(12, 5, 1),
    )


def norms_across_groups():
    """Groups of norms and of convolutions that have no rows in common."""
    return nn.Sequential(
        nn.Conv2d(12, 24, 3, groups=2), nn.GroupNorm(3, 24), nn.ReLU(), nn.Conv2d(24, 24, 3, groups=4),
        nn.GroupNorm(6, 24), nn.Conv2d(24, 5, 1),
    )  # fmt: skip


def shared_keys():
    """Two query heads for each key head, counted by the sizes that there are."""

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (-1, 8)) for layer in (self.q, self.k, self.v))
        q = q.unflatten(2, (k.shape[2], q.shape[2] // k.shape[2]))
        weights = torch.einsum("bngrd,bmgd->bgrnm", q, k).softmax(-1)
        return self.out(torch.einsum("bgrnm,bmgd->bngrd", weights, v).flatten(2))

    return Model(forward, q=nn.Linear(12, 32), k=nn.Linear(12, 16), v=nn.Linear(12, 16), out=nn.Linear(32, 5))


ENTANGLED = {
    "shuffled groups": (shuffled_groups, image(12)),
    "norms across groups": (norms_across_groups, image(12)),
    "shared keys": (shared_keys, torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(1))),
}


@pytest.mark.parametrize("name", ENTANGLED)
def test_units_that_seem_right_for_some_numbers_of_them_are_not_offered(name):
    build, x = ENTANGLED[name]
    model, groups, notes = find(build, x)
    assert groups or any(": stays, because" in note for note in notes[1:])
    for group in groups.values():
        assert change_by_order(model, group, x) < 1e-4, group.name


@pytest.mark.parametrize(
    ("layer", "after", "units"),
    [
        (nn.ChannelShuffle(2), 24, (12, 2)),
        (nn.ChannelShuffle(3), 24, (8, 3)),
        (nn.PixelShuffle(2), 6, (6, 4)),
        (nn.Sequential(nn.PixelShuffle(2), nn.BatchNorm2d(6), nn.PReLU(6)), 6, (6, 4)),
        (nn.Sequential(nn.Unfold(3, padding=1), nn.Fold(8, 3, padding=1)), 24, (24, 1)),
        (nn.Sequential(nn.Flatten(2), nn.Fold(16, 2, stride=2), nn.ReLU()), 6, (6, 4)),
    ],
)
def test_channels_that_an_operator_moves_leave_in_its_units(layer, after, units):
    x = image()
    model, groups, notes = find(lambda: nn.Sequential(nn.Conv2d(3, 24, 1), layer, nn.Conv2d(after, 5, 1)), x)
    group = groups["0"]
    assert (group.width, group.channels) == units, notes
    assert change_by_order(model, group, x) < 1e-4


@pytest.mark.parametrize(
    "function",
    [
        functional.hardswish, lambda y: functional.hardswish(y, inplace=True), lambda y: 1 - y, lambda y: 2 * y // 1,
        lambda y: functional.mish(y, inplace=True), lambda y: functional.threshold(y, 0.1, 0.0, inplace=True),
        lambda y: torch.polar(y, y).real, lambda y: torch.complex(y, y).imag,
    ],
)  # fmt: skip
def test_channels_pass_through_functions_of_single_elements(function):
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(20, 32), nn.Linear(32, 5)

        def forward(self, x):
            return self.last(function(self.first(x).sigmoid()))

    _, groups, notes = find(Through, torch.randn(4, 20))
    assert "first" in groups, notes


def added_to_a_part(self, x):
    h = self.first(x).relu()
    h[:, :8].add_(self.other(x))
    return self.last(h)


def parts_that_differ(self, x):
    first, second, third = self.first(x).split([8, 8, 16], -1)
    return self.last(torch.cat([first * second, third], -1)[:, :16]) + self.other(x).sum(1, keepdim=True)


def running_sum(self, x):
    return self.last(self.first(x).cumsum(-1)) + self.other(x).sum(1, keepdim=True)


def test_channels_beside_a_part_that_is_written_to_leave():
    def build():
        return Model(added_to_a_part, first=nn.Linear(20, 32), other=nn.Linear(20, 8), last=nn.Linear(32, 5))

    _, groups, notes = find(build, torch.randn(4, 20))
    (member,) = (member for member in groups["first"].members if member.name == "first.weight")
    assert sorted(index for unit in member.indices for index in unit) == list(range(8, 32))
    assert "other" not in groups
    assert any(note.startswith("other: stays, because ") for note in notes), notes


@pytest.mark.parametrize("forward", [parts_that_differ, running_sum])
def test_a_layer_that_stays_is_named(forward):
    def build():
        last = nn.Linear(16 if forward is parts_that_differ else 32, 5)
        return Model(forward, first=nn.Linear(20, 32), other=nn.Linear(20, 8), last=last)

    _, groups, notes = find(build, torch.randn(4, 20))
    assert "first" not in groups
    assert any(note.startswith("first: stays, because ") for note in notes), notes


def tied_counts():
    """Scores of one attention are a bias of another's, which ties their numbers of heads through no weight."""

    def forward(self, x):
        h, bias = x, None
        for q, k, v, out in zip(self.q, self.k, self.v, self.out, strict=True):
            parts = [layer(h).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (q, k, v)]
            bias = torch.zeros(1, parts[0].shape[1], 1, 1) if bias is None else bias
            weights = (parts[0] @ parts[1].mT + bias).softmax(-1)
            h = out((weights @ parts[2]).transpose(1, 2).flatten(2))
        return h

    def layers(inputs, outputs):
        return nn.ModuleList([nn.Linear(inputs, outputs) for _ in range(2)])

    return Model(forward, q=layers(12, 32), k=layers(12, 32), v=layers(12, 32), out=layers(32, 12))


def test_a_group_that_only_runs_when_others_lose_as_many_is_not_offered():
    x = torch.randn(2, 6, 12)
    model, groups, notes = find(tied_counts, x)
    assert any("heads: stays, because the model does not run without" in note for note in notes), notes
    for group in groups.values():
        assert run(prune(model, [(group, [0])]), x).shape == x.shape


def test_parts_without_elements_and_channels_last_images_are_followed():
    def rotate_all(self, x):
        h = self.first(x)
        return self.last(torch.cat([h[..., :32].relu(), h[..., 32:]], -1))

    _, groups, notes = find(
        lambda: Model(rotate_all, first=nn.Linear(20, 32), last=nn.Linear(32, 5)), torch.randn(4, 20)
    )
    assert groups["first"].width == 32, notes

    def pooled():
        layers = nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)

    _, groups, notes = find(pooled, image().to(memory_format=torch.channels_last))
    assert groups["0"].width == 16, notes
