"""llmqat itself, through its public surface: a layer by `prepare` and `convert`, a model by `pack` and `load`.

Layers lie on 2 MiB pages, where `load` puts those of a model.
"""

import ctypes
import os
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

import llmqat
from llmqat.kernels import native, pages

from . import torch_peers
from .shapes import GROUP_SIZE, MODELS


class OneLayer(PreTrainedModel):
    """A model of a single Linear, which is what `llmqat.prepare` needs to make a packed one."""

    config_class = PretrainedConfig

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(PretrainedConfig())
        self.layer = layer

    def get_input_embeddings(self) -> None:
        """None: it has neither tokens nor a head."""

    get_output_embeddings = get_input_embeddings


HEAD_BITS = 8


class Worker(torch_peers.Worker):
    """llmqat with or without quantized activations.

    Args:
        threads: of torch.
        directory: scratch folder for packed models.
        act_bits: 8 or None.
    """

    copies_are_used_first = False  # what the first call prepares belongs to one layer

    def __init__(self, threads: int, directory: Path, act_bits: int | None) -> None:
        self.scheme = llmqat.QuantScheme(bits=4, group_size=GROUP_SIZE, act_bits=act_bits)
        super().__init__(threads, directory)

    def describe(self) -> dict[str, Any]:
        """As for any peer, the scheme, and the kernel if one was forced."""
        forced = os.environ.get("LLMQAT_KERNELS")
        return {**super().describe(), "scheme": str(self.scheme), "LLMQAT_KERNELS": forced, "lm_head_bits": HEAD_BITS}

    @torch.no_grad()
    def linear(self, out: int, inner: int) -> nn.Module:
        """A packed layer of random weights, rounded to nearest."""
        scheme = self.scheme if inner % GROUP_SIZE == 0 else llmqat.QuantScheme(bits=4, group_size=-1)
        model = OneLayer(torch_peers.dense(out, inner, torch.float32))
        llmqat.prepare(model, scheme, init="rtn", storage_dtype=self.dtype)
        return llmqat.convert(model).layer

    def open_layer(self, out: int, inner: int, rows: list[int], cold_bytes: int) -> dict[str, Any]:
        """As for any peer, on large pages."""
        opened = super().open_layer(out, inner, rows, cold_bytes)
        pages.use_huge_pages(self.layers)
        return opened

    def path(self, shape: str) -> Path:
        """Where the packed model of a shape is."""
        return self.directory / f"{shape}-int4-g{GROUP_SIZE}-a{self.scheme.act_bits or 16}-head{HEAD_BITS}"

    @torch.no_grad()
    def build_model(self, shape: str) -> dict[str, Any]:
        """Write the packed model, if it is not there."""
        path = self.path(shape)
        started = time.perf_counter()
        if not (path / "config.json").exists():
            shutil.rmtree(path, ignore_errors=True)
            model = torch_peers.dense_model(MODELS[shape], self.dtype)
            llmqat.prepare(model, self.scheme, init="rtn", storage_dtype=self.dtype, lm_head_bits=HEAD_BITS)
            llmqat.pack(model, path)
        files = sum(file.stat().st_size for file in path.glob("*.safetensors"))
        return {"file_bytes": files, "build_seconds": time.perf_counter() - started}

    def load(self, shape: str) -> Any:
        """The packed model, by `llmqat.load`."""
        return llmqat.load(self.path(shape))


class KernelWorker(Worker):
    """Its layers in the library, one call after the other, without the operator: what the native decoder sees."""

    def open_layer(self, out: int, inner: int, rows: list[int], cold_bytes: int) -> dict[str, Any]:
        """As through the operator, and the structs that the library reads."""
        opened = super().open_layer(out, inner, rows, cold_bytes)
        if native.library() is None:
            raise llmqat.LlmqatError(native.explain())
        self.matrices = (native.Matrix * len(self.layers))(*(native.matrix(x.packed) for x in self.layers))
        self.output = torch.empty(max(rows), out, dtype=self.dtype)
        return opened

    def run_layers(self, x: Tensor, count: int) -> None:
        """The next `count` copies of the layer."""
        kernels, dtype = native.library(), native.DTYPES[x.dtype]
        kernels.llmqat_set_threads(native.threads())
        while count:
            calls = min(count, len(self.layers) - self.turn)
            first = ctypes.addressof(self.matrices) + self.turn * ctypes.sizeof(native.Matrix)
            kernels.llmqat_linears(first, calls, x.data_ptr(), self.output.data_ptr(), len(x), dtype)
            self.turn, count = (self.turn + calls) % len(self.layers), count - calls
