"""`onnx`: a graph of `MatMulNBits` layers for ONNX Runtime, built by the model builder of onnxruntime-genai.

The builder knows the families, and takes layers on a grid from a GPTQ checkpoint of version 1. It divides weights by
their scales to find the codes again, so what it wrote is read back and compared with the packed model.
https://github.com/microsoft/onnxruntime-genai
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llmqat.errors import LlmqatError, last_word
from llmqat.formats.export.directory import moved, write_directory
from llmqat.formats.export.gptq import gptq_entries, gptq_tensors
from llmqat.formats.export.source import Source
from llmqat.formats.importing.exported import decoder_of, layer_differences
from llmqat.models.loading import load_tokenizer
from llmqat.nn.packed_linear import PackedLinear

NEEDS = "onnxruntime_genai", "onnx", "onnx_ir"
# Model types whose graphs say what `llmqat.load` says, to the rounding of float32, in ONNX Runtime 1.32; others of the
# builder do not: it rounds the scale of Gemma's embeddings, and OLMo's logits are others (tried with 0.18).
FAMILIES = "ernie4_5", "granite", "hunyuan_v1_dense", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"
# Without these the builder rounds what is float to 4 bits, too.
FLOAT_NODES = "/lm_head/MatMul,/model/embed_tokens/Gather"
TOKENIZER = "tokenizer_config.json"
FLOAT, INT8 = 1, 4  # "accuracy levels" of MatMulNBits: how it computes with activations


def write_onnx(source: Source, scratch: Path) -> None:
    """Write the model to `scratch` as a graph with its weights beside it, and what onnxruntime-genai reads.

    Raises:
        LlmqatError: if the builder is not installed, does not know the model, or wrote other codes or scales.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise LlmqatError(f"export to onnx needs {', '.join(missing)}: pip install 'llmqat[onnx]'")
    kind = source.model.config.model_type
    if kind not in FAMILIES:
        raise LlmqatError(f"export to onnx is for {', '.join(FAMILIES)}, and this is {kind}; choose another format")
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        write_directory(
            source,
            Path(folder),
            moved(source, builder_layer),
            torch.float32,
            {"quantization_config": gptq_entries(source) | {"checkpoint_format": "gptq"}},
        )
        _build(source, Path(folder), scratch)
    _check(source, scratch)
    _say_special_tokens(source, scratch / TOKENIZER)


def builder_layer(layer: PackedLinear) -> dict[str, Tensor]:
    """Tensors of a layer in GPTQ's format of version 1, whose zero points wrap around, with scales as they are."""
    return gptq_tensors(layer, version=1, scale_dtype=torch.float32)


def _build(source: Source, checkpoint: Path, output: Path) -> None:
    int8 = any(layer.scheme.inputs != "float" for layer in source.layers.values())
    options = [f"accuracy_level={INT8 if int8 else FLOAT}", f"nodes_to_exclude={FLOAT_NODES}"]
    command = [sys.executable, "-P", "-m", "onnxruntime_genai.models.builder", "-m", str(checkpoint), "-i"]
    command += [str(checkpoint), "-o", str(output), "-p", "int4", "-e", "cpu", "-c", str(checkpoint)]
    done = subprocess.run(
        [*command, "--extra_options", *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    if done.returncode:
        raise LlmqatError(f"the builder of onnxruntime-genai failed: {last_word(done.stdout, done.returncode)}")


def _check(source: Source, written: Path) -> None:
    """Compare codes, scales and zero points of every layer with those of the packed model, bit for bit."""
    differences = layer_differences(decoder_of(written, "onnx", source))
    if differences:
        raise LlmqatError(f"the builder of onnxruntime-genai wrote another model: it {differences[0]}")


def _say_special_tokens(source: Source, path: Path) -> None:
    """Write which tokens the tokenizer puts around a text by the keys that onnxruntime-genai reads: it does not know
    them by the template of a tokenizer.json."""
    tokenizer = load_tokenizer(str(source.directory))
    ids = tokenizer("x")["input_ids"]
    said = {
        "add_bos_token": ids[0] == tokenizer.bos_token_id,
        "add_eos_token": ids[-1] == tokenizer.eos_token_id,
    }
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | said, indent=2) + "\n", "utf-8")
