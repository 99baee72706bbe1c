"""Peers that are a kind of torch Linear: dense, aten's int4 op, GPTQModel, bitsandbytes; whole models around them."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from .shapes import GROUP_SIZE, MODELS, ModelShape
from .timing import mean_rate

TILE = 1 << 20
HELPERS = ("g_idx", "wf_", "weight_shape")  # buffers that no matmul reads


def random_weight(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers of standard deviation 0.02, repeated after TILE: the values do not change what a kernel costs."""
    size = torch.Size(shape).numel()
    tile = torch.empty(min(TILE, size)).normal_(0, 0.02, generator=torch.Generator().manual_seed(0)).to(dtype)
    return tile.repeat(-(-size // len(tile)))[:size].view(shape)


def dense(out: int, inner: int, dtype: torch.dtype) -> nn.Module:
    """`nn.Linear`."""
    linear = nn.Linear(inner, out, bias=False, device="meta")
    linear.weight = nn.Parameter(random_weight((out, inner), dtype))
    return linear


class Int4Pack(nn.Module):
    """torch's own int4 kernel for CPUs, on random codes."""

    def __init__(self, out: int, inner: int, dtype: torch.dtype) -> None:
        super().__init__()
        codes = torch.randint(16, (out, inner), dtype=torch.int32)
        self.register_buffer("weight", torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        scale_and_zero = torch.tensor([0.01, 0.0], dtype=dtype).repeat(inner // GROUP_SIZE, out, 1)
        self.register_buffer("scale_and_zero", scale_and_zero)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x.flatten(0, -2), self.weight, GROUP_SIZE, self.scale_and_zero)
        return y.view(*x.shape[:-1], -1)


def bitsandbytes(out: int, inner: int, dtype: torch.dtype) -> nn.Module:
    """`bitsandbytes.nn.Linear4bit`, nf4, its default block of 64."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    linear = Linear4bit(inner, out, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    linear.weight = Params4bit(random_weight((out, inner), dtype), requires_grad=False, quant_type="nf4")
    return linear.to("cpu").eval()


def gptqmodel(out: int, inner: int, dtype: torch.dtype) -> nn.Module:
    """GPTQModel's fastest CPU layer: AVX-512 where the machine has it, else on aten's int4 op."""
    from gptqmodel.nn_modules.qlinear.torch_aten_kernel import TorchAtenLinear
    from gptqmodel.nn_modules.qlinear.torch_cpu_avx512 import TorchCpuAvx512Linear

    layer = TorchCpuAvx512Linear if TorchCpuAvx512Linear.validate_once()[0] else TorchAtenLinear
    linear = layer(bits=4, group_size=GROUP_SIZE, sym=True, desc_act=False, in_features=inner, out_features=out)
    linear.qweight.random_(-(2**31), 2**31)
    linear.qzeros.fill_(-0x77777778)  # code 8 everywhere
    linear.scales.fill_(0.01)
    linear.post_init()
    return linear.eval()


LINEARS: dict[str, Callable[[int, int, torch.dtype], nn.Module]] = {
    "dense": dense,
    "int4pack": Int4Pack,
    "bitsandbytes": bitsandbytes,
    "gptqmodel": gptqmodel,
}


def stored_bytes(module: nn.Module) -> int:
    """Bytes of weights, scales and zero points of a layer before its first call."""
    buffers = [b for name, b in module.named_buffers() if not name.startswith(HELPERS)]
    tensors = [*module.parameters(), *buffers]
    state = getattr(getattr(module, "weight", None), "quant_state", None)  # bitsandbytes keeps its scales here
    if state is not None:
        tensors.append(state.absmax)
    return sum(t.numel() * t.element_size() for t in tensors)


def dense_model(shape: ModelShape, dtype: torch.dtype, linear: Callable[[int, int], nn.Module] | None = None) -> Any:
    """A transformers Llama of random weights, every Linear of its blocks made by `linear`."""
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        vocab_size=shape.vocab,
        max_position_embeddings=shape.context,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,  # a random model must not stop early
    )
    with init_empty_weights(include_buffers=False):
        model = LlamaForCausalLM._from_config(config, dtype=dtype)
    for name, module in list(model.named_modules()):
        if linear is not None and isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, linear(module.out_features, module.in_features))
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                ones = parameter.dim() == 1
                value = torch.ones_like(parameter, device="cpu") if ones else random_weight(parameter.shape, dtype)
                # As `from_pretrained` leaves it: torch copies a matrix without gradients before a product of one row.
                module._parameters[key] = nn.Parameter(value)
    model.tie_weights()
    return model.eval()


class Worker:
    """Times single layers and whole models of one kind of Linear.

    Args:
        threads: of torch.
        directory: scratch folder for model files.
        linear: key of LINEARS.
        dtype: of activations and float parts.
    """

    copies_are_used_first = True  # what a layer rearranges on its first call is done once, then copied

    def __init__(self, threads: int, directory: Path, linear: str = "dense", dtype: str = "bfloat16") -> None:
        torch.set_num_threads(threads)
        self.directory, self.dtype, self.kind = directory, getattr(torch, dtype), linear
        self.layers: list[nn.Module] = []
        self.inputs: dict[int, Tensor] = {}
        self.turn = 0
        self.model: Any = None
        self.linear(64, 256)  # what is not installed shows here

    def describe(self) -> dict[str, Any]:
        """Versions, threads, and the layer that runs."""
        layer = type(self.linear(64, 256)).__name__
        return {"torch": torch.__version__, "threads": torch.get_num_threads(), "layer": layer}

    def linear(self, out: int, inner: int) -> nn.Module:
        """A layer of random weights."""
        return LINEARS[self.kind](out, inner, self.dtype)

    @torch.inference_mode()
    def open_layer(self, out: int, inner: int, rows: list[int], cold_bytes: int) -> dict[str, Any]:
        """As many copies of a layer as fill `cold_bytes`, and an input for every number of rows."""
        self.close()
        self.inputs = {m: torch.randn(m, inner, dtype=self.dtype) for m in rows}
        layer = self.linear(out, inner)
        size = stored_bytes(layer)
        if self.copies_are_used_first:
            layer(self.inputs[rows[0]])
        self.layers = [layer, *(copy.deepcopy(layer) for _ in range(cold_bytes // size))]
        for other in self.layers:
            other(self.inputs[rows[0]])
        for x in self.inputs.values():
            layer(x)
        return {"bytes": size, "copies": len(self.layers)}

    @torch.inference_mode()
    def time_layer(self, rows: int, seconds: float) -> float:
        """Seconds a call, over at least `seconds`, each call on the next copy."""
        x, calls, check = self.inputs[rows], 0, 1
        started = time.perf_counter()
        while True:
            self.run_layers(x, check)
            calls += check
            taken = time.perf_counter() - started
            if taken >= seconds:
                return taken / calls
            check = max(1, min(calls, int(calls * (seconds - taken) / taken)))

    def run_layers(self, x: Tensor, count: int) -> None:
        """The next `count` copies of the layer."""
        for _ in range(count):
            self.turn = (self.turn + 1) % len(self.layers)
            self.layers[self.turn](x)

    def build_model(self, shape: str) -> dict[str, Any]:
        """Nothing: the weights are made in memory."""
        return {}

    def load(self, shape: str) -> Any:
        """The model itself."""
        linear = None if self.kind == "dense" else self.linear
        return dense_model(MODELS[shape], self.dtype, linear)

    def open_model(self, shape: str) -> dict[str, Any]:
        """Load a model; a prefill and a few steps to warm it."""
        self.close()
        started = time.perf_counter()
        self.model = self.load(shape)
        loaded = time.perf_counter() - started
        self.generate(16, 4)
        return {"load_seconds": loaded, "dtype": str(self.model.dtype).removeprefix("torch.")}

    @torch.inference_mode()
    def generate(self, prompt: int, tokens: int) -> float:
        """Seconds of generating `tokens` greedily from a prompt of random tokens, at batch 1."""
        generator = torch.Generator().manual_seed(prompt)
        ids = torch.randint(self.model.config.vocab_size, (1, prompt), generator=generator)
        mask = torch.ones_like(ids)
        started = time.perf_counter()
        output = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        taken = time.perf_counter() - started
        if output.shape[1] != prompt + tokens:
            raise RuntimeError(f"generate gave {output.shape[1] - prompt} tokens instead of {tokens}")
        return taken

    def prefill_tok_s(self, prompt: int, seconds: float) -> float:
        """Tokens a second until the first new token is there."""
        return mean_rate(prompt, lambda: self.generate(prompt, 1), seconds)

    def decode_tok_s(self, prompt: int, tokens: int, seconds: float) -> float:
        """Tokens a second after the first, the time of the prompt left out."""

        def once() -> float:
            first = self.generate(prompt, 1)
            return self.generate(prompt, 1 + tokens) - first

        return mean_rate(tokens, once, seconds)

    def close(self) -> None:
        """Free layers and model."""
        self.layers, self.inputs, self.turn, self.model = [], {}, 0, None
