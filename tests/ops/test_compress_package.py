"""Packages of AOTInductor that check their inputs: other layouts are copied, other shapes and dtypes refused."""

import pytest
import torch
from support.devices import INDUCTOR
from torch import nn

import torch_sluice
from torch_sluice.compress import load_package, quantize_layer, save_package

pytestmark = INDUCTOR


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = quantize_layer(nn.Conv2d(3, 8, 3)), quantize_layer(nn.Linear(8, 5))
        self.requires_grad_(False)

    def forward(self, image, scale=None, double=False):
        x = self.conv(image * torch.arange(6.0)).mean((2, 3))
        x = self.head(x) if scale is None else self.head(x) * scale
        return x * 2 if double else x


@pytest.fixture(scope="module")
def packaged(tmp_path_factory):
    torch.manual_seed(0)
    model, path = Model().train(), tmp_path_factory.mktemp("package") / "model.pt2"
    batch = torch.export.Dim("batch", min=1, max=16)
    inputs = {"image": torch.randn(2, 3, 6, 6), "scale": torch.ones(5), "double": True}
    save_package(model, inputs, path, {"image": {0: batch}, "scale": None, "double": None})
    assert model.training
    return model.eval(), path, load_package(path)


def test_other_layouts_are_copied_where_a_bare_package_is_wrong(packaged):
    model, path, package = packaged
    image, scale = torch.randn(4, 3, 6, 6), torch.rand(5)
    layouts = (
        image, image.to(memory_format=torch.channels_last), image.transpose(2, 3), image[:1], image[1:],
        image.expand(4, 3, 6, 6), image[:, :, :1].expand(4, 3, 6, 6), image.permute(0, 1, 3, 2).contiguous(),
    )  # fmt: skip
    for some in layouts:
        expected = model(some, scale, True)
        torch.testing.assert_close(package(image=some, scale=scale, double=True), expected)
        torch.testing.assert_close(package(double=True, scale=scale.repeat_interleave(2)[::2], image=some), expected)
    bare = torch._inductor.aoti_load_package(str(path))
    wrong = bare(image=layouts[2], scale=scale, double=True)
    assert not torch.allclose(wrong, model(layouts[2], scale, True), rtol=1e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(image=torch.zeros(17, 3, 6, 6)), r"image has shape \[17, 3, 6, 6\], expected \[1 to 16, 3, 6, 6\]"),
        (dict(image=torch.zeros(2, 3, 6, 7)), r"image has shape \[2, 3, 6, 7\]"),
        (dict(image=torch.zeros(3, 6, 6)), r"image has shape \[3, 6, 6\]"),
        (dict(image=torch.zeros(2, 3, 6, 6).double()), "image is torch.float64 on cpu, expected a tensor of"),
        (dict(scale=None), "there are|scale is a NoneType, expected a tensor"),
        (dict(scale=torch.zeros(5, device="meta")), "scale is torch.float32 on meta"),
        (dict(double=False), "double is False, expected True, which it was when it was exported"),
        (dict(more=1), r"keyword inputs are \['double', 'image', 'more', 'scale'\], expected \['double'"),
    ],
)  # fmt: skip
def test_other_inputs_are_refused(change, message, packaged):
    inputs = {"image": torch.zeros(2, 3, 6, 6), "scale": torch.zeros(5), "double": True, **change}
    with pytest.raises(ValueError, match=message):
        packaged[2](**inputs)


def test_a_compressed_model_of_channels_last_images(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))
    x = torch.randn(8, 3, 6, 6).to(memory_format=torch.channels_last)
    small = torch_sluice.compress(model, x, [(x, None)] * 2, keep=0.5, prune=False, progress=False)
    save_package(small, x, tmp_path / "x.pt2")
    package = load_package(tmp_path / "x.pt2")
    torch.testing.assert_close(package(x), small(x))
    torch.testing.assert_close(package(x.contiguous()), small(x))


def test_bad_paths_and_inputs(tmp_path):
    layer, x = nn.Linear(4, 4).requires_grad_(False), torch.zeros(2, 4)
    with pytest.raises(ValueError, match="path is 'x', expected a name that ends in .pt2"):
        save_package(layer, x, "x")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        load_package(tmp_path / "none.pt2")
    program = torch.export.export(layer, (x,))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "other.pt2"))
    with pytest.raises(ValueError, match="does not say which inputs it takes"):
        load_package(tmp_path / "other.pt2")
