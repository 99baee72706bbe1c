"""Decoder blocks run through `torch.compile` while a model trains.

Block by block, not the whole model: all blocks share one compiled graph, and the losses that go through the output head
in chunks stay as they are. Quantized layers are operators, into which the compiler does not look (see
`llmqat.nn.fake_quant_operator`): codes, scales and ``W_hat`` keep their bits. Where transformers collects hidden states
for the loss, its own hooks split a block into two graphs at the attention.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from llmqat.compat.torch import variants_of_compiled_functions
from llmqat.models.architectures import blocks_of
from llmqat.nn.native_modules import forward_by

# Of one function, compiled apart: layers of each shape, with gradients and without, on the grid and as a float teacher,
# in whole batches and the last one of an evaluation.
VARIANTS = 128


@contextmanager
def compiled_blocks(*models: Any) -> Iterator[None]:
    """Compile the blocks of models inside the ``with``, each when it first runs.

    Args:
        models: the one that trains and its teacher, which may be one.
    """
    roots: list[Any] = [model.get_base_model() if isinstance(model, PeftModel) else model for model in models]
    blocks: dict[int, nn.Module] = {id(block): block for root in roots for block in blocks_of(root)}
    with variants_of_compiled_functions(VARIANTS), ExitStack() as stack:
        for block in blocks.values():
            compiled: Callable[..., Any] = torch.compile(block.forward)
            stack.enter_context(forward_by(block, compiled))
        yield
