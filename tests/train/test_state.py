from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat.mapped import is_mapped
from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme
from llmqat.train.modes import add_lora
from llmqat.train.state import hash_of_base, moving_tensors, put_back, put_back_random, random_states, taken_out

COMMON = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "num_hidden_layers": 1}
LLAMA_1B = {**COMMON, "hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64, "tie_word_embeddings": True}
LLAMA_8B = {**COMMON, "hidden_size": 4096, "intermediate_size": 14336, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("config", "blocks", "parameters", "share"),
    [(LLAMA_1B, 16, 1_235_814_400, 0.146), (LLAMA_8B, 32, 8_030_261_248, 0.084)],
    ids=["1B", "8B"],
)
def test_bytes_of_a_lora_checkpoint(config, blocks, parameters, share):
    """At r = 32, the default: values, moments and best values in float32, as a share of the model in bfloat16."""
    with torch.device("meta"):
        model = LlamaForCausalLM._from_config(LlamaConfig(**config))
    block = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) + (blocks - 1) * block == parameters
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    adapters = blocks * sum(32 * (linear.in_features + linear.out_features) for linear in linears)
    assert (4 + 8 + 4) * adapters / (2 * parameters) == pytest.approx(share, abs=1e-3)
    assert share <= 0.15


@pytest.mark.parametrize("in_a_file", [False, True])
def test_what_moves_and_what_it_stands_on_are_all_of_a_model(tiny_llama, tokens, tmp_path, in_a_file):
    model = tiny_llama(tie_word_embeddings=True, num_hidden_layers=1)
    scheme = QuantScheme(4, 32, symmetric=False, act_bits=8, act_static=True)
    prepare(model, scheme, init="gptq", calibration=tokens, keep_float=True)
    model = add_lora(model, 2)
    moving, base = moving_tensors(model), hash_of_base(model, {})
    endings = {name.removesuffix(".default.weight").rpartition(".")[-1] for name in moving}
    assert endings == {"lora_A", "lora_B", "act_scale", "act_state"}
    assert len(moving) == 4 * 7
    taken = taken_out(moving, tmp_path / "state" if in_a_file else None)
    assert all(map(is_mapped, taken.values())) == in_a_file
    for name, tensor in model.state_dict().items():
        before = tensor.clone()
        tensor.add_(1)
        assert (hash_of_base(model, {}) == base) == (name in moving), name
        tensor.copy_(before)
    for tensor in moving.values():
        tensor.add_(1)
    put_back(model, taken)
    assert all(torch.equal(tensor, taken[name]) for name, tensor in moving.items())
    assert hash_of_base(model, {"a layer": torch.ones(1)}) != base == hash_of_base(model, {})


def test_generators_go_on_where_they_were(monkeypatch):
    device, put = torch.device("xpu"), []
    own = SimpleNamespace(get_rng_state=lambda: "of the device", set_rng_state=put.append)
    monkeypatch.setattr(torch, "get_device_module", lambda asked: own if asked == device else None)
    states = random_states(device)
    assert random_states(torch.device("cpu")).keys() == {"cpu"}
    drawn = torch.rand(3)
    put_back_random(states, torch.device("cpu"))  # another kind: its own goes on
    assert put == []
    put_back_random(states, device)
    assert torch.equal(torch.rand(3), drawn)
    assert put == ["of the device"]
