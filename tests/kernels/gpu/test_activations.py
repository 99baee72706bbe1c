"""Int8 activations as GPUs find them, run by Triton's interpreter: the bits of torch."""

import pytest
import torch

from llmqat.kernels import activations as seam
from llmqat.kernels.gpu import activations, available
from llmqat.kernels.gpu.tiles import Tile
from llmqat.quant import affine

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NARROW = Tile(16, 64, 4)  # so that a row of a test has several
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def tokens(width, dtype):
    """Tokens of every size: zeros of both signs, NaN, infinity, denormal numbers, ties, and the largest of a dtype."""
    x = torch.randn(13, width) * torch.logspace(-3, 3, 13)[:, None]
    x[0], x[1, 0], x[2, -1], x[3, 0], x[4] = 0, torch.nan, torch.inf, -torch.inf, -0.0
    x[5] = torch.randint(-127, 128, (width,)) * 0.5
    x[5, 0] = 127
    x[6] = x[6].clamp(-1, 1) * torch.finfo(dtype).max
    x[7], x[8] = x[7] * 1e-43, 0
    x[8, 0] = 1.4e-45  # so small that the scale is zero
    x = x.to(dtype)
    x[9, 0] = torch.finfo(dtype).max
    x[10] = x[10].abs().clamp(min=1) * torch.finfo(dtype).tiny
    return x


def same_bits(found, expected):
    """Whether all bits are equal; NaN may be any."""
    nan = expected != expected
    found, expected = (torch.where(nan, 0, x).contiguous() for x in (found, expected))
    kind = BITS[expected.itemsize]
    return found.dtype == expected.dtype and torch.equal(found.view(kind), expected.view(kind))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("width", [1, 130])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dynamic_activations_have_the_bits_of_torch(dtype, width):
    x = tokens(width, dtype)
    expected, (codes, scale) = affine.fake_quantize_activation(x), affine.quantize_activation(x)
    assert expected.isnan().any(-1).tolist() == [k in (1, 2, 3) for k in range(13)]
    for tile in (None, NARROW):
        assert same_bits(activations.fake_quantize_activation(x, tile), expected)
        found = activations.quantize_activation(x, tile)
        known = ~scale.isnan().squeeze(-1)  # no code stands for NaN
        assert torch.equal(found[0][known], codes[known])
        assert found[0].dtype == torch.int8
        assert same_bits(found[1], scale)
    heads = x[:12].view(2, 2, 3, width).transpose(1, 2)  # keys and values come so
    assert same_bits(activations.fake_quantize_activation(heads), affine.fake_quantize_activation(heads))
    assert activations.quantize_activation(heads)[1].shape == (2, 3, 2, 1)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [0.013, -0.5, torch.nan])
def test_static_activations_have_the_bits_of_torch(dtype, scale):
    x = tokens(37, dtype)
    for stored in DTYPES:
        s = torch.tensor([scale]).to(stored)
        assert same_bits(activations.fake_quantize_static(x, s), affine.fake_quantize_static(x, s))


def test_layers_take_the_kernels_where_they_run(monkeypatch):
    ran = []
    monkeypatch.setattr(available, "runs_on", lambda device: True)
    for name in ("_dynamic", "_static"):
        kernel = getattr(activations, name)
        monkeypatch.setattr(activations, name, _Counted(kernel, name, ran))
    x = torch.randn(3, 8, requires_grad=True)
    y = seam.fake_quant_activation(x)
    y.sum().backward()
    assert torch.equal(y, affine.fake_quantize_activation(x))
    assert x.grad.eq(1).all()
    assert torch.equal(seam.static_activation(x, torch.ones(1)), affine.fake_quantize_static(x, torch.ones(1)))
    seam.quantize_activation(x)
    assert ran == ["_dynamic", "_static", "_dynamic"]
    wide = x.detach().double()
    assert torch.equal(seam.fake_quantize_activation(wide), affine.fake_quantize_activation(wide))
    assert len(ran) == 3


class _Counted:
    """A kernel that remembers its launches."""

    def __init__(self, kernel, name, ran):
        self.kernel, self.name, self.ran = kernel, name, ran

    def __getitem__(self, grid):
        self.ran.append(self.name)
        return self.kernel[grid]
