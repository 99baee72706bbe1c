"""Compile every row of `LAUNCHES` for every capability of `CAPABILITIES`, and print what came of it as JSON.

A process of its own, since the interpreter of the other tests cannot compile.
"""

import json
from collections.abc import Callable

import torch

from llmqat.kernels.gpu import activations, gptq, grid_rows, linear, losses
from llmqat.kernels.packed import Packed
from llmqat.quant.affine import choose_scale
from llmqat.quant.grid import Adapters, Compensation, Grid, Latent
from llmqat.quant.packing import packed_width
from llmqat.scheme import QuantScheme
from tests.kernels.gpu.absent_gpu import compiled_for

CAPABILITIES = (80, 89, 90)
ROWS, COLUMNS, RANK = 256, 1024, 32


def weight_of(scheme: QuantScheme, *, adapters: bool, dtype: torch.dtype = torch.float32) -> tuple[Latent, Grid]:
    """A weight of `ROWS` rows and its grid; adapters come with a compensation."""
    weight = torch.zeros(ROWS, COLUMNS, dtype=dtype)
    scale, zero_point = choose_scale(weight, scheme, torch.bfloat16)
    step = torch.zeros(scale.shape, dtype=torch.bfloat16)
    change = Compensation(weight.to(torch.int8), step) if adapters else None
    lora = Adapters(torch.zeros(RANK, COLUMNS), torch.zeros(ROWS, RANK), 2.0) if adapters else None
    return Latent(weight, change, lora), Grid(scale.float(), zero_point, None, scheme, torch.bfloat16)


def w_hat(scheme: QuantScheme, *, adapters: bool) -> Callable[[], object]:
    """A launch that makes ``W_hat`` of a base stored in bfloat16."""
    latent, grid = weight_of(scheme, adapters=adapters, dtype=torch.bfloat16)
    return lambda: grid_rows.fake_quantize(latent, grid, torch.bfloat16)


def gradients(scheme: QuantScheme, *, clip_mask: bool) -> Callable[[], object]:
    """A launch that finds all gradients of a grid."""
    latent, grid = weight_of(scheme, adapters=True)
    found = grid_rows.GridGradients(*(torch.zeros_like(grid.scale) for _ in range(2)), None)
    return lambda: grid_rows.grid_gradients(torch.zeros(ROWS, COLUMNS), latent, grid, found, clip_mask)


def search(scheme: QuantScheme) -> Callable[[], object]:
    """A launch that searches for the scales of a weight."""
    weight, candidates = torch.zeros(ROWS, COLUMNS), [(1.0, False), (0.9, False)]
    return lambda: gptq.search_scale(weight, torch.ones(COLUMNS), scheme, torch.bfloat16, candidates)


def walk(scheme: QuantScheme) -> Callable[[], object]:
    """A launch that quantizes a block of columns, one after the other."""
    _, grid = weight_of(scheme, adapters=False)
    grid = grid._replace(scale=grid.scale.to(grid.storage_dtype))
    latent, codes = torch.zeros(2, 128, ROWS)
    return lambda: gptq.quantize_block(latent, codes, torch.zeros(128, 128), torch.zeros(128, dtype=torch.int64), grid)


def packed(scheme: QuantScheme) -> Packed:
    """A packed layer of bfloat16 scales, with a bias."""
    groups, bits = COLUMNS // scheme.group_length(COLUMNS), scheme.bits
    zero_point = torch.zeros(packed_width(ROWS, bits), groups, dtype=torch.int32)
    codes, scale = torch.zeros(ROWS, packed_width(COLUMNS, bits), dtype=torch.int32), torch.zeros(ROWS, groups)
    return Packed(codes, scale.bfloat16(), None if scheme.symmetric else zero_point, torch.zeros(ROWS), bits, COLUMNS)


def product(scheme: QuantScheme, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[], object]:
    """A launch that multiplies by packed weights, and the one that adds its parts."""
    layer, x = packed(scheme), torch.zeros(tokens, COLUMNS, dtype=dtype)
    return lambda: linear.few_tokens(x, layer)


def token_losses(vocabulary: int, *, teacher: bool) -> Callable[[], object]:
    """A launch that writes gradients over logits of bfloat16."""
    logits = torch.zeros(4, vocabulary, dtype=torch.bfloat16)
    targets = torch.zeros_like(logits) if teacher else torch.zeros(4, dtype=torch.int64)
    return lambda: losses.token_losses(logits, targets, 0.5, logits)


LAUNCHES = {
    "product of a token": product(QuantScheme(4, 128), 1),
    "product of 3 bits": product(QuantScheme(3, 16, symmetric=False), 16),
    "product of 64 tokens": product(QuantScheme(4, 32, symmetric=False), 64),
    "product in float32": product(QuantScheme(4, 128), 1, torch.float32),
    "dequantized": lambda: linear.dequantize(packed(QuantScheme(4, 128)), torch.bfloat16),
    "w_hat": w_hat(QuantScheme(4, 128), adapters=False),
    "w_hat of small groups": w_hat(QuantScheme(4, 32, symmetric=False), adapters=False),
    "w_hat of whole rows": w_hat(QuantScheme(8, -1), adapters=False),
    "w_hat with adapters": w_hat(QuantScheme(4, 128), adapters=True),
    "gradients": gradients(QuantScheme(4, 128), clip_mask=False),
    "gradients with mask": gradients(QuantScheme(4, 64, symmetric=False), clip_mask=True),
    "search for scales": search(QuantScheme(4, 128)),
    "search for scales of whole rows": search(QuantScheme(4, -1, symmetric=False, scale_dtype="float16")),
    "walk along columns": walk(QuantScheme(4, 128, symmetric=False)),
    "losses by a teacher": token_losses(128256, teacher=True),
    "losses by ids, of an odd vocabulary": token_losses(50257, teacher=False),
    "state errors": lambda: losses.state_errors(*torch.zeros(2, 4, 4096, dtype=torch.bfloat16), torch.ones(4)),
    "activations": lambda: activations.fake_quantize_activation(torch.zeros(4, 14336, dtype=torch.bfloat16)),
}


def main() -> None:
    """Print a list of rows: the launch, the capability, and the fields of `Compiled`."""
    rows = []
    for capability in CAPABILITIES:
        for launch, run in LAUNCHES.items():
            with compiled_for(capability) as compiled:
                run()
            rows += [{"launch": launch, "capability": capability, **kernel._asdict()} for kernel in compiled]
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
