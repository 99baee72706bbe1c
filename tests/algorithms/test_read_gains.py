import pytest
import torch

from llmqat.algorithms.read_gains import gain_of, read_gains
from llmqat.models.architectures import blocks_of

# Family -> the norms that read what its blocks return, from its first weight on: of the next block, and the last one.
READERS = {
    "llama": ("input_layernorm", "model.norm", 0),
    "phi3": ("input_layernorm", "model.norm", 0),
    "gemma3_text": ("input_layernorm", "model.norm", 1),
    "gpt2": ("ln_1", "transformer.ln_f", 0),
    "opt": ("self_attn_layer_norm", "model.decoder.final_layer_norm", 0),
}


@pytest.mark.parametrize("model_type", READERS)
def test_the_next_norm_has_the_gain(tiny, model_type):
    inner, last, offset = READERS[model_type]
    model = tiny(model_type).eval()
    blocks = list(blocks_of(model))
    norms = [*(block.get_submodule(inner) for block in blocks[1:]), model.get_submodule(last)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, std=3.0)
        if getattr(norm, "bias", None) is not None:
            torch.nn.init.normal_(norm.bias)
    gains = read_gains(model, blocks, torch.randint(0, 64, (4, 12)))
    assert len(gains) == len(blocks)
    for norm, gain in zip(norms, gains, strict=True):
        torch.testing.assert_close(gain, (norm.weight.detach() + offset).abs(), rtol=1e-4, atol=1e-4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_that_end_with_a_norm_have_no_gain(tiny):
    model = tiny("bert").eval()
    gains = read_gains(model, list(blocks_of(model)), torch.randint(0, 64, (1, 12)))
    assert all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)


def test_bfloat16_is_measured_too():
    norm = torch.nn.RMSNorm(32, dtype=torch.bfloat16)
    torch.nn.init.normal_(norm.weight)
    gain = gain_of(norm, torch.zeros(1, 4, 32, dtype=torch.bfloat16))
    assert gain.dtype == torch.float32
    torch.testing.assert_close(gain, norm.weight.detach().float().abs(), rtol=1e-2, atol=0)
