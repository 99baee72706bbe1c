"""Trained tiny models, packed; and a decoder of the file format that shares no code with llmqat."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme
from llmqat.train.modes import add_lora, select_trainable

# Rows of 48 and 80 weights and of 24 outputs: words are not filled evenly by 3-bit codes, nor by zero points.
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}


@pytest.fixture(scope="session")
def small_llama() -> Callable[..., LlamaForCausalLM]:
    """A random one-layer Llama with awkward sizes."""

    def make(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**SMALL | overrides)).eval()

    return make


def rate(name: str, parameter: torch.Tensor) -> float:
    """A learning rate with which a step or two move a parameter by a part of its size, and adapters by codes."""
    if "lora_" in name:
        return 1.0
    return min(0.005, 0.1 * float(parameter.detach().abs().mean())) if name.endswith(".scale") else 0.005


@pytest.fixture(scope="session")
def trained(small_llama) -> Callable[..., torch.nn.Module]:
    """``trained(scheme)``: a model prepared, trained for two steps, and ready to be packed."""

    def make(
        scheme: QuantScheme,
        dtype: torch.dtype = torch.float32,
        mode: str = "full",
        model: Any = None,
        seed: int = 0,
        overrides: Any = None,
    ) -> torch.nn.Module:
        model = small_llama(seed) if model is None else model
        prepare(model, scheme, storage_dtype=dtype, overrides=overrides)
        if mode == "lora":
            model = add_lora(model, 4)
        select_trainable(model, mode)
        ids = torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(seed))
        trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.Adam({"params": [p], "lr": rate(name, p)} for name, p in trains.items())
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
        return model.eval()

    return make


@pytest.fixture
def packed(trained, tmp_path) -> tuple[torch.nn.Module, Path]:
    """A trained int4 model and the directory it was packed to."""
    model = trained(QuantScheme(4, 16), torch.bfloat16)
    return model, save_packed(model, tmp_path / "packed")


def unpack_bits(words: np.ndarray, bits: int, length: int) -> np.ndarray:
    """Unsigned codes ``(rows, length)`` of int32 ``(rows, words)``: code i at bit ``i * bits``, low bits first."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream[:, : length * bits].reshape(len(words), length, bits) @ (1 << np.arange(bits))


@pytest.fixture(scope="session")
def decode() -> Callable[..., dict[str, tuple[torch.Tensor, ...]]]:
    """``decode(directory, bits, symmetric)``: layer -> codes as stored, scale, zero point, and W_hat in the scale's
    dtype."""

    def read(directory: Path, bits: int, symmetric: bool) -> dict[str, tuple[torch.Tensor, ...]]:
        tensors = load_file(directory / "model.safetensors")
        layers = {}
        for name in [key.removesuffix(".weight_packed") for key in tensors if key.endswith(".weight_packed")]:
            rows, columns = tensors[f"{name}.weight_shape"].tolist()
            scale = tensors[f"{name}.weight_scale"]
            codes = torch.from_numpy(unpack_bits(tensors[f"{name}.weight_packed"].numpy(), bits, columns))
            zero = torch.full(scale.shape, 1 << (bits - 1))
            if not symmetric:
                zero = torch.from_numpy(unpack_bits(tensors[f"{name}.weight_zero_point"].numpy().T, bits, rows).T)
            group = columns // scale.shape[1]
            w_hat = (codes - zero.repeat_interleave(group, 1)).to(scale.dtype) * scale.repeat_interleave(group, 1)
            layers[name] = codes, scale, zero, w_hat
        return layers

    return read
