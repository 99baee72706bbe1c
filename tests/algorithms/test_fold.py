import pytest
import torch
from torch import nn

from llmqat.algorithms.fold import Fold, apply_checked
from llmqat.errors import LlmqatError
from llmqat.scheme import QuantScheme


def fold_of(source, readers, **options):
    written = tuple(p.data for p in source.parameters())
    read, schemes = tuple(r.weight.data for r in readers), (QuantScheme(),) * len(readers)
    return Fold("block.norm", written, read, schemes, readers[0], **{"head_dim": written[0].shape[0]} | options)


class Small(nn.Module):
    """norm -> two linears, the second of which may be forgotten."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 5), nn.Linear(8, 5)
        self.dtype = torch.float32

    def forward(self, input_ids, use_cache=False):
        x = self.norm(torch.eye(8)[input_ids])
        return type("Output", (), {"logits": self.a(x) + self.b(x)})


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=["layer", "rms"])
def test_keeps_the_bits_of_what_the_linears_compute(norm):
    nn.init.normal_(norm.weight)
    if getattr(norm, "bias", None) is not None:
        nn.init.normal_(norm.bias)
    linears, x, s = [nn.Linear(8, 5), nn.Linear(8, 3)], torch.randn(4, 8), 2.0 ** torch.arange(-4, 4)
    before, normed = [linear(norm(x)) for linear in linears], norm(x)
    fold_of(norm, linears).apply(s)
    for linear, y in zip(linears, before, strict=True):
        assert torch.equal(linear(norm(x)), y)
    assert torch.equal(norm(x), normed / s)


def test_rows_of_a_linear_and_its_bias():
    source, reader, x, s = nn.Linear(6, 8), nn.Linear(8, 3), torch.randn(4, 6), 2.0 ** torch.arange(-4, 4)
    before, middle = reader(source(x)), source(x)
    fold_of(source, [reader]).apply(s)
    assert torch.equal(reader(source(x)), before)
    assert torch.equal(source(x), middle / s)


def test_weight_absmax_is_that_of_the_layers_to_be_quantized():
    a, b = nn.Linear(4, 6), nn.Linear(4, 3)
    both = fold_of(nn.LayerNorm(4), [a, b])
    assert torch.equal(both.weight_absmax(), torch.cat([a.weight, b.weight]).abs().amax(0))
    first = Fold("x", both.written, both.read, (QuantScheme(), None), a, head_dim=4)
    assert torch.equal(first.weight_absmax(), a.weight.abs().amax(0))
    neither = Fold("x", both.written, both.read, (None, None), a, head_dim=4)
    assert torch.equal(neither.weight_absmax(), both.weight_absmax())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_offset_norm_gets_a_weight_that_its_dtype_holds(dtype):
    norm, reader = nn.RMSNorm(200), nn.Linear(200, 3)
    norm.weight.data = (5 * torch.randn(200)).to(dtype).float()
    norm.weight.data[:2] = torch.tensor([-1.0, 0.004])  # a dead channel, and one that 2^12 would kill
    fold = fold_of(norm, [reader], offset=1.0)
    s = fold.representable(torch.full((200,), 2.0**4), dtype)
    assert s[0] == 1
    dead = fold.representable(torch.full((200,), 2.0**12), torch.bfloat16)
    assert dead.isfinite().all()
    assert dead.abs().min() > 0
    multiplier = 1 + norm.weight.data
    fold.apply(s)
    stored = norm.weight.data.to(dtype).float()
    torch.testing.assert_close(norm.weight.data, stored, rtol=0, atol=1e-6)
    torch.testing.assert_close((1 + stored) * s, multiplier, rtol=1e-5, atol=0)
    assert torch.equal(fold_of(norm, [reader]).representable(dead, dtype), dead), "without an offset nothing rounds"


def test_a_norm_with_another_reader_is_put_back_and_named():
    model, probe, s = Small(), torch.arange(8)[None], torch.full((8,), 4.0)
    before = model(probe).logits
    state = {name: p.clone() for name, p in model.named_parameters()}
    message = r"smoothing block\.norm changed the float logits by .*something else reads .* leave --smooth out"
    with pytest.raises(LlmqatError, match=message):
        apply_checked(model, "block.norm", {fold_of(model.norm, [model.a]): s}, probe, before)
    for name, p in model.named_parameters():
        assert torch.equal(p, state[name]), name
    assert apply_checked(model, "block.norm", {fold_of(model.norm, [model.a, model.b]): s}, probe, before) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_only_offset_norms_need_float32(dtype):
    norm, reader = nn.RMSNorm(4).to(dtype), nn.Linear(4, 3)
    fold_of(norm, [reader]).check_dtype()
    name = str(dtype).removeprefix("torch.")
    with pytest.raises(LlmqatError, match=f"exact in float32, not in {name}; load the model with dtype=torch.float32"):
        fold_of(norm, [reader], offset=1.0).check_dtype()
