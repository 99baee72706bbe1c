"""What the kernels of GPUs do on one: the bits of a CPU, and their speed beside plain torch. Under ten minutes.

    python eval/gpu.py --output eval/results/gpu.json

Shapes are those of a Llama of 8 B parameters with groups of 128, stored in bfloat16; everything is random. Times are
medians of calls between two events of the device, each after the second-level cache was overwritten. A section that
fails says so in the results, and the others run. `--tiny --device cpu` runs the script itself, not the kernels.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _results import write
from transformers import LlamaConfig, LlamaForCausalLM

import llmqat
from llmqat import QuantScheme
from llmqat.algorithms.gptq import gptq
from llmqat.kernels import grid_rows
from llmqat.kernels.gpu import available
from llmqat.kernels.ops import packed_linear, reference
from llmqat.kernels.packed import Packed
from llmqat.quant import fake_quant
from llmqat.quant.affine import choose_scale, quantize
from llmqat.quant.grid import Adapters, Compensation, Grid, Latent
from llmqat.quant.packing import pack_rows, to_unsigned
from llmqat.train.losses import chunk_losses

GROUP, RANK, ROUNDS = 128, 32, 15
CACHE_BYTES = 256 << 20  # more than the second-level cache of any GPU


class Sizes(NamedTuple):
    """How large everything is: of a model of 8 B parameters, or tiny.

    Attributes:
        hidden: width of the model.
        intermediate: width of its MLP.
        key_value: rows of keys, and of values.
        blocks: decoder blocks that train.
        vocabulary: words.
        tokens: of a training step.
    """

    hidden: int = 4096
    intermediate: int = 14336
    key_value: int = 1024
    blocks: int = 8
    vocabulary: int = 32000
    tokens: int = 2048

    @property
    def layers(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of the layers of a block, by the projections that have them."""
        return {
            "q_proj, o_proj": (self.hidden, self.hidden),
            "k_proj, v_proj": (self.key_value, self.hidden),
            "gate_proj, up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    def model(self) -> LlamaForCausalLM:
        """A random Llama of these sizes."""
        config = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.hidden // 128,
            num_key_value_heads=self.key_value // 128,
            vocab_size=self.vocabulary,
            use_cache=False,
        )
        return LlamaForCausalLM(config)


TINY = Sizes(hidden=256, intermediate=384, key_value=128, blocks=1, vocabulary=64, tokens=32)


class Gpu:
    """The device, and how time passes on it."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.flushed = torch.empty(CACHE_BYTES if self.there else 1, dtype=torch.int8, device=self.device)

    @property
    def there(self) -> bool:
        """Whether it is one."""
        return self.device.type != "cpu"

    def microseconds(self, call: Callable[[], object], rounds: int = ROUNDS) -> float:
        """Median of some calls, with cold caches, after two to warm up."""
        for _ in range(2):
            call()
        return statistics.median(self._once(call) for _ in range(rounds))

    def _once(self, call: Callable[[], object]) -> float:
        self.flushed.zero_()
        if not self.there:
            started = time.perf_counter()
            call()
            return (time.perf_counter() - started) * 1e6
        begin, end = (torch.Event(device=self.device, enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.accelerator.synchronize(self.device)
        return float(begin.elapsed_time(end)) * 1e3


def random_weight(rows: int, columns: int, scheme: QuantScheme, *, adapters: bool) -> tuple[Latent, Grid]:
    """A weight in bfloat16 and its grid, on the CPU; with adapters comes a compensation."""
    weight = (torch.randn(rows, columns) * 0.02).bfloat16()
    scale, zero_point = choose_scale(weight.float(), scheme, torch.bfloat16)
    grid = Grid(scale.float(), zero_point, None, scheme, torch.bfloat16)
    if not adapters:
        return Latent(weight), grid
    step = (torch.rand(scale.shape) * 1e-5).bfloat16()
    change = Compensation(torch.randint(-128, 128, weight.shape, dtype=torch.int8), step)
    return Latent(weight, change, Adapters(torch.randn(RANK, columns) / 64, torch.randn(rows, RANK) / 64, 1.0)), grid


def moved(value: Any, device: torch.device) -> Any:
    """A value with all of its tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(field, device) for field in value))
    return value


def copy_bandwidth(gpu: Gpu, sizes: Sizes) -> dict[str, Any]:
    """GB/s of a copy within the memory of the device, read and written."""
    source = torch.empty(sizes.hidden * sizes.intermediate * 16, dtype=torch.int8, device=gpu.device)
    target = torch.empty_like(source)
    return {"gb_per_s": 2e-3 * source.nbytes / gpu.microseconds(lambda: target.copy_(source))}


def same_bits(gpu: Gpu, sizes: Sizes) -> dict[str, Any]:
    """How many codes and values of ``W_hat`` differ from those of torch on the CPU, by grid; of how many."""
    found = {}
    for bits, group, symmetric in ((4, 128, True), (4, 32, False), (3, 64, True), (2, 64, False), (8, -1, True)):
        latent, grid = random_weight(
            sizes.hidden + 3, sizes.hidden, QuantScheme(bits, group, symmetric), adapters=False
        )
        there, its_grid = moved(latent, gpu.device), moved(grid, gpu.device)
        codes = grid_rows.codes_of(there, its_grid).cpu()
        w_hat = grid_rows.fake_quantize(there, its_grid, torch.bfloat16).cpu()
        found[f"{bits} bits, groups of {group}, {'symmetric' if symmetric else 'asymmetric'}"] = {
            "codes": int((codes != fake_quant.codes_of(latent, grid)).sum()),
            "w_hat": int((w_hat != fake_quant.fake_quantize(latent, grid, torch.bfloat16)).sum()),
            "of": codes.numel(),
        }
    return found


def fake_quant_times(gpu: Gpu, sizes: Sizes) -> dict[str, Any]:
    """Microseconds and GB/s of making ``W_hat``, plain, and with adapters and compensation; and of torch."""
    found: dict[str, Any] = {}
    for name, (rows, columns) in sizes.layers.items():
        for adapters in (False, True):
            latent, grid = moved(random_weight(rows, columns, QuantScheme(4, GROUP), adapters=adapters), gpu.device)
            call = partial(grid_rows.fake_quantize, latent, grid, torch.bfloat16)
            us = gpu.microseconds(call)
            bytes_moved = rows * columns * (5 if adapters else 4)
            in_torch = gpu.microseconds(partial(fake_quant.fake_quantize, latent, grid, torch.bfloat16), 3)
            found[f"{name}{', adapters' * adapters}"] = {
                "microseconds": us,
                "gb_per_s": bytes_moved / us / 1e3,
                "torch_microseconds": in_torch,
            }
    return found


def packed_times(gpu: Gpu, sizes: Sizes) -> dict[str, Any]:
    """Microseconds of a packed product, of the reference, and of torch in bfloat16, by tokens."""
    rows, columns = sizes.intermediate, sizes.hidden
    scheme = QuantScheme(4, GROUP)
    weight = torch.randn(rows, columns, device=gpu.device) * 0.02
    scale, _ = choose_scale(weight, scheme, torch.bfloat16)
    codes = pack_rows(to_unsigned(quantize(weight, scale, None, scheme), scheme), scheme.bits)
    packed, dense, found = Packed(codes, scale, None, None, 4, columns), weight.bfloat16(), {}
    for tokens in (1, 4, 16, 64, 256, sizes.tokens):
        x = torch.randn(tokens, columns, device=gpu.device, dtype=torch.bfloat16)
        found[str(tokens)] = {
            "packed": gpu.microseconds(partial(packed_linear, x, packed)),
            "reference": gpu.microseconds(partial(reference, x, packed), 3),
            "bfloat16": gpu.microseconds(partial(torch.nn.functional.linear, x, dense)),
        }
    return found


def step_times(gpu: Gpu, sizes: Sizes) -> dict[str, Any]:
    """Milliseconds and peak gigabytes of a LoRA step by cross-entropy, in float and through the grid."""
    found = {}
    ids = torch.randint(0, sizes.vocabulary, (max(1, sizes.tokens // 512), min(512, sizes.tokens)), device=gpu.device)
    for name in ("float", "quantized"):
        model: Any = sizes.model().bfloat16().to(gpu.device)
        llmqat.prepare(model, QuantScheme(4, GROUP), init="rtn", storage_dtype=torch.bfloat16)
        model = llmqat.add_lora(model, r=RANK).train()
        for module in model.modules():
            if name == "float" and hasattr(module, "scheme"):
                module.enabled = False
        if gpu.there:
            torch.accelerator.reset_peak_memory_stats(gpu.device)
        us = gpu.microseconds(lambda model=model: model(input_ids=ids, labels=ids).loss.backward(), 5)
        peak = torch.accelerator.max_memory_allocated(gpu.device) if gpu.there else 0
        found[name] = {"milliseconds": us / 1e3, "peak_gb": peak / 1e9}
    return found


def gptq_times(gpu: Gpu, sizes: Sizes) -> dict[str, Any]:
    """Seconds of GPTQ of each layer of a block, its Hessian given."""
    found = {}
    for name, (rows, columns) in sizes.layers.items():
        weight = torch.randn(rows, columns, device=gpu.device) * 0.02
        x = torch.randn(2 * columns, columns, device=gpu.device)
        call = partial(gptq, weight, x.T @ x / columns, QuantScheme(4, GROUP), torch.bfloat16)
        found[name] = gpu.microseconds(call, 1) / 1e6
    return found


def loss_times(gpu: Gpu, sizes: Sizes) -> dict[str, Any]:
    """Microseconds of the loss of tokens with its gradient, and GB/s; of torch's cross-entropy with its own."""
    tokens, vocabulary = sizes.tokens // 2, 4 * sizes.vocabulary
    logits, teacher = (torch.randn(tokens, vocabulary, device=gpu.device, dtype=torch.bfloat16) for _ in range(2))
    ids, into = torch.randint(0, vocabulary, (tokens,), device=gpu.device), torch.empty_like(logits)
    found = {}
    for name, targets, passes in (("kl", teacher, 5), ("cross-entropy", ids, 3)):
        us = gpu.microseconds(partial(chunk_losses, logits, targets, tokens, into))
        found[name] = {"microseconds": us, "gb_per_s": passes * logits.nbytes / us / 1e3}
    logits.requires_grad_()
    by_torch = gpu.microseconds(lambda: torch.nn.functional.cross_entropy(logits.float(), ids).backward())
    return {**found, "torch_cross_entropy": by_torch}


def demo(gpu: Gpu, sizes: Sizes) -> dict[str, Any]:
    """The bundled Llama quantized on the device and on the CPU: how many codes differ."""
    codes = {}
    for device in ("cpu", gpu.device):
        model: Any = llmqat.load_float("llama").to(device)
        llmqat.prepare(model, QuantScheme(4, 64), init="rtn")
        codes[str(device)] = [layer.codes().cpu() for layer in model.modules() if hasattr(layer, "codes")]
    first, second = codes["cpu"], codes[str(gpu.device)]
    differing = sum(int((a != b).sum()) for a, b in zip(first, second, strict=True))
    return {"codes": differing, "of": sum(map(torch.numel, first))}


SECTIONS = {
    "copy": copy_bandwidth,
    "bits": same_bits,
    "fake_quant": fake_quant_times,
    "packed": packed_times,
    "step": step_times,
    "gptq": gptq_times,
    "losses": loss_times,
    "demo": demo,
}


def main() -> None:
    """Run the sections, and write what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--tiny", action="store_true", help="matrices that take no time")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    gpu, sizes = Gpu(args.device), TINY if args.tiny else Sizes()
    torch.manual_seed(0)
    results: dict[str, Any] = {
        "environment": llmqat.environment(),
        "kernels": available.explain(gpu.device),
        "sizes": sizes._asdict(),
        "sections": {},
    }
    for name in args.sections:
        started = time.perf_counter()
        try:
            found = SECTIONS[name](gpu, sizes)
        except Exception as error:  # the device is lent for minutes: the other sections count
            found = {"error": f"{type(error).__name__}: {error}"}
        results["sections"][name] = {**found, "seconds": round(time.perf_counter() - started, 1)}
        print(name, results["sections"][name], flush=True)
        write(args.output, results)


if __name__ == "__main__":
    main()
