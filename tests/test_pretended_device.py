"""Parts of llmqat on a device that is not the CPU; the whole of a run is in tests/pipeline/test_device.py."""

import copy

import pytest
import torch
from torch import nn

import llmqat
from llmqat.algorithms import gptq
from llmqat.scheme import QuantScheme
from tests.pretended_device import PRETENDED

SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}


def test_tensors_of_two_devices_do_not_meet(pretended):
    here, cpu = torch.ones(2, device=PRETENDED), torch.ones(2)
    assert (here.device, (here + 1)[1:].device, torch.zeros_like(here).device) == (PRETENDED,) * 3
    assert cpu.to(here).device == copy.deepcopy(nn.Parameter(here)).device == PRETENDED
    assert here.cpu().device == cpu.device == torch.device("cpu")
    with pytest.raises(RuntimeError, match=r"aten.add.Tensor expects all tensors on one device"):
        here + cpu
    with pytest.raises(TypeError, match="to numpy"):
        here.numpy()


def test_gradients_stay_on_the_device(pretended):
    layer = nn.Linear(3, 2).to(PRETENDED)
    layer(torch.ones(4, 3, device=PRETENDED))[:, :1].relu().square().sum().backward()
    assert {p.grad.device for p in layer.parameters()} == {PRETENDED}


@pytest.mark.parametrize("init", ["gptq", "blockwise"])
def test_codes_are_found_on_a_device(pretended, tiny_llama, tokens, init):
    """Every tensor is made where the model is, whatever the scheme."""
    schemes = {
        "[qk]_proj": {"bits": 3, "symmetric": False},
        "o_proj": {"act_bits": 8},
        "down_proj": {"act_bits": 8, "act_static": True},
    }
    options = {"overrides": schemes, "keep_float": True, "kv_bits": 8, "lm_head_bits": 4}
    model = tiny_llama(**SMALL).to(PRETENDED)
    llmqat.prepare(model, QuantScheme(4, 16), init=init, calibration=tokens, block_steps=1, **options)
    assert {tensor.device for tensor in model.state_dict().values()} == {PRETENDED}
    llmqat.convert(model)
    assert {tensor.device for tensor in model.state_dict().values()} == {PRETENDED}
    assert model(tokens[0].to(PRETENDED)).logits.isfinite().all()


def test_a_tensor_made_on_the_cpu_fails(pretended, tiny_llama, tokens, monkeypatch):
    """What GPTQ once did."""
    choose = gptq.search_scale
    monkeypatch.setattr(gptq, "search_scale", lambda *args: (choose(*args)[0].cpu(), None))
    with pytest.raises(RuntimeError, match="expects all tensors on one device, got"):
        llmqat.prepare(tiny_llama(**SMALL).to(PRETENDED), QuantScheme(4, 16), init="gptq", calibration=tokens)


def test_experts_on_a_device(pretended, tiny_moe, tokens):
    few = {"num_experts": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 1, "mlp_only_layers": []}
    model = tiny_moe("qwen3_moe", **SMALL | few).to(PRETENDED)
    llmqat.prepare(model, QuantScheme(4, 16), init="gptq", calibration=tokens)
    assert {tensor.device for tensor in model.state_dict().values()} == {PRETENDED}


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_smoothing_on_a_device(pretended, tiny_llama, tokens, alpha):
    model = tiny_llama(**SMALL).to(PRETENDED)
    llmqat.smooth(model, tokens, alpha, scheme=QuantScheme(4, 16, act_bits=8))
    assert {tensor.device for tensor in model.state_dict().values()} == {PRETENDED}
