"""Training from the codes of a packed model: bit for bit its codes at the start, latents that can move."""

import pytest
import torch

from llmqat.algorithms.gptq_model import GptqSettings
from llmqat.config import from_dict
from llmqat.errors import LlmqatError
from llmqat.formats.given_codes import INSIDE, grids_in, latent_of, take_codes
from llmqat.formats.given_grid import prepare_from, with_given_grid
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.models.widening import compute_in_float32
from llmqat.quant.affine import choose_scale
from llmqat.quant.fake_quant import codes_of
from llmqat.quant.grid import Grid, Latent
from llmqat.scheme import QuantScheme

SCHEMES = [QuantScheme(4, 32), QuantScheme(3, -1), QuantScheme(4, 16, symmetric=False), QuantScheme(8, 32)]


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_latents_have_the_codes_and_lie_next_to_the_weight(scheme):
    torch.manual_seed(0)
    weight = torch.randn(6, 64)
    scale, zero_point = choose_scale(weight, scheme, torch.bfloat16)
    scale[0, 0] *= -1 if scheme.symmetric else 1  # of either sign
    grid = Grid(scale.float(), zero_point, None, scheme, torch.bfloat16)
    nearest = codes_of(Latent(weight), grid)
    moved = (nearest.int() + torch.randint(-1, 2, nearest.shape)).clamp(scheme.qmin, scheme.qmax).to(nearest.dtype)
    latent = latent_of(weight, moved, grid)
    assert torch.equal(codes_of(Latent(latent), grid), moved)
    kept = moved == nearest
    in_codes = scale.abs().float().repeat_interleave(scheme.group_length(64), 1)
    assert ((latent - weight).abs()[kept] <= in_codes[kept] * INSIDE * 1.01).all()
    inner = (nearest > scheme.qmin) & (nearest < scheme.qmax)  # others may be far beyond the grid
    assert ((latent - weight).abs()[inner] <= in_codes[inner] * (1.5 + INSIDE)).all()
    assert not torch.equal(latent, grid.stored().dequantize(moved).float())


def test_a_group_of_zeros():
    scheme = QuantScheme(4, 16)
    weight = torch.zeros(2, 32)
    grid = Grid(choose_scale(weight, scheme, torch.bfloat16)[0].float(), None, None, scheme, torch.bfloat16)
    assert torch.equal(latent_of(weight, torch.zeros(2, 32, dtype=torch.int8), grid), weight)


def test_codes_off_the_grid():
    scheme = QuantScheme(4, 16)
    grid = Grid(torch.ones(1, 1), None, None, scheme, torch.bfloat16)
    with pytest.raises(LlmqatError, match="codes that no weight has on this grid"):
        latent_of(torch.zeros(1, 16), torch.full((1, 16), 9, dtype=torch.int8), grid)


@pytest.fixture
def given(tiny, tokenizer, tmp_path):
    """A model whose codes are not those of rounding to nearest, with scales in float16, packed; down_proj in 8 bits."""
    model = tiny("llama")
    prepare(
        model, QuantScheme(4, 16), overrides={"down_proj": {"bits": 8}, "k_proj": "float"}, storage_dtype=torch.float16
    )
    torch.manual_seed(0)
    for on_grid in quantized_layers(model):
        on_grid.layer.weight.data += 0.01 * torch.randn_like(on_grid.layer.weight)
    return save_packed(model, tmp_path / "given", tokenizer)


def unpacked(directory):
    model = load_packed(directory)
    return {name: model.get_submodule(name).unpack() for name in grids_in(directory)}


@pytest.mark.parametrize("keep_float", [False, True])
def test_packed_again_it_is_the_model_that_was_given(given, tiny, tokenizer, tmp_path, keep_float):
    model, other = tiny("llama", dtype=torch.bfloat16), tiny("llama", dtype=torch.bfloat16)
    recipe = with_given_grid(from_dict({"init": {"codes_from": str(given)}}), model)
    assert with_given_grid(recipe, model) == recipe
    quant = recipe.quant
    assert (quant.bits, quant.group_size, quant.lm_head_bits) == (4, 16, None)
    assert quant.overrides[r"^model\.layers\.0\.mlp\.down_proj$"] == {"bits": 8}
    scheme = QuantScheme(quant.bits, quant.group_size)
    prepare(model, scheme, overrides=quant.overrides, storage_dtype=torch.bfloat16)
    compute_in_float32(model, torch.bfloat16)  # as a run does, whose scales then are bfloat16
    take_codes(model, given, GptqSettings(keep_float=keep_float))
    found, right = unpacked(save_packed(model, tmp_path / "again", tokenizer)), unpacked(given)
    assert found.keys() == right.keys()
    for name, tensors in right.items():
        assert all(a is b or torch.equal(a, b) for a, b in zip(tensors, found[name], strict=True))
        assert found[name][1].dtype == torch.float16  # bfloat16 does not hold these scales
    prepare_from(other, given, keep_float=keep_float)
    for own, theirs in zip(quantized_layers(other), quantized_layers(model), strict=True):
        assert torch.equal(own.codes(), theirs.codes())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, r"given is W4A16 g16 symmetric, and not of bits 3; leave that out"),
        ({"overrides": {"up_proj": "float"}}, r"given is W4A16 g16 symmetric, and not of overrides"),
    ],
)
def test_another_grid_is_refused(given, tiny, change, message):
    with pytest.raises(LlmqatError, match=message):
        with_given_grid(from_dict({"init": {"codes_from": str(given)}, "quant": change}), tiny("llama"))


def test_another_float_model_or_grid_is_refused(given, tiny):
    model = tiny("llama")
    prepare(model, QuantScheme(4, 16))
    with pytest.raises(LlmqatError, match=r"given has model\.layers\.0\.self_attn\.k_proj on another grid, or float"):
        take_codes(model, given, GptqSettings())
    model = tiny("llama")
    model.model.norm.weight.data *= 1.1
    prepare(model, QuantScheme(4, 16))
    with pytest.raises(
        LlmqatError, match=r"given has another model\.norm\.weight than the float model: it was made of"
    ):
        take_codes(model, given, GptqSettings())


def test_scales_that_the_scale_dtype_of_the_run_does_not_hold(tiny, tokenizer, tmp_path):
    packed, model = tiny("llama"), tiny("llama")
    prepare(packed, QuantScheme(4, 16), storage_dtype=torch.float32)
    save_packed(packed, tmp_path / "given", tokenizer)
    prepare(model, QuantScheme(4, 16, scale_dtype="float16"))
    with pytest.raises(LlmqatError, match=r"q_proj: its scales are not all float16; give no --scale-dtype"):
        take_codes(model, tmp_path / "given", GptqSettings())


def test_a_directory_without_codes(tiny, tokenizer, tmp_path):
    tiny("llama").save_pretrained(tmp_path / "float")
    with pytest.raises(LlmqatError, match=r"--codes-from .*float is not packed; llmqat import makes it so"):
        with_given_grid(from_dict({"init": {"codes_from": str(tmp_path / "float")}}), tiny("llama"))
