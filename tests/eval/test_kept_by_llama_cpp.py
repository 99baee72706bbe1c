"""`eval/kept_by_llama_cpp.py`: the float file that llama.cpp quantizes holds the model, in its order."""

import importlib
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]


def test_tensors_of_the_float_file(tiny, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "eval")
    float_tensors = importlib.import_module("kept_by_llama_cpp").float_tensors
    model = tiny("llama", tie_word_embeddings=True)
    found, layer = float_tensors(model), model.model.layers[0]
    assert "output.weight" not in found
    assert len(found) == len(model.state_dict()) - 1
    torch.testing.assert_close(found["token_embd.weight"], model.get_input_embeddings().weight.detach().half())
    assert found["output_norm.weight"].dtype == torch.float32
    assert torch.equal(found["blk.0.attn_v.weight"], layer.self_attn.v_proj.weight.detach().half())
    config, half = model.config, model.config.head_dim // 2
    for name, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
        weight = getattr(layer.self_attn, f"{name}_proj").weight.detach().half()
        rows = [2 * half * head + i + part * half for head in range(heads) for i in range(half) for part in (0, 1)]
        assert torch.equal(found[f"blk.0.attn_{name}.weight"], weight[rows])  # the halves of each pair side by side
