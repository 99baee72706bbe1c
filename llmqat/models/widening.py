"""Compute in float32 on a model whose large weights stay in the dtype in which its files have them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.models.architectures import known_architecture
from llmqat.models.patcher import float_parameters, quantized_layers
from llmqat.nn.embedding import is_lookup
from llmqat.nn.widened import WidenedEmbedding, WidenedLinear


@torch.no_grad()
def compute_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Let a prepared model, of which nothing trains yet, compute in float32 on weights that are stored in `dtype`.

    Layers on the grid, and in families that have a row in `ARCHITECTURES` the input embedding and the output head, keep
    their weights in `dtype`, if that holds their numbers, and widen them as they use them; layers on the grid their
    scales, too: codes and ``W_hat`` are the same bits. All else is small, and made float32. The forward of another
    family may read the dtype of its head.
    """
    kept: list[Tensor] = [part for found in quantized_layers(model) for part in (found.layer.weight, found.layer.scale)]
    kept += ends_that_widen(model) if known_architecture(model) is not None else ()
    for weight in kept:
        stored = weight.data.to(dtype)
        # Of a weight without values it is taken for granted.
        if weight.is_meta or torch.equal(stored.to(weight.dtype), weight):
            weight.data = stored
    ids = {id(weight) for weight in kept}
    others = [parameter for parameter in float_parameters(model) if id(parameter) not in ids]
    for tensor in (*others, *model.buffers()):
        if tensor.is_floating_point() and tensor.dtype.itemsize < 4:
            tensor.data = tensor.data.float()


def ends_that_widen(model: PreTrainedModel) -> Iterator[Tensor]:
    """Put modules that widen their weights in the place of input embedding and output head, and yield those weights; of
    ends that are more than a lookup and a Linear none."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if is_lookup(embedding):
        model.set_input_embeddings(WidenedEmbedding.from_embedding(embedding))
        yield embedding.weight
    elif getattr(head, "weight", None) is getattr(embedding, "weight", None):
        return  # one matrix, which the embedding does not widen
    if type(head) is nn.Linear:
        model.set_output_embeddings(WidenedLinear.from_linear(head))
        yield head.weight
