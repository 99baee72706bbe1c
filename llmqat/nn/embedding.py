"""Input embeddings tied to a quantized output head: one matrix on the grid, looked up here and multiplied by there."""

from collections.abc import Callable
from typing import Any, Self, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from llmqat.compat.torch import KeepsDtypes
from llmqat.errors import LlmqatError
from llmqat.nn.context import check_token_ids
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.fake_quant_lookup import fake_quant_embedding
from llmqat.nn.lora import LoraFakeQuantLinear
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.grid import Adapters


class _TiedEmbedding(nn.Module):
    """Base of the lookups of a tied embedding, fake-quantized and packed.

    Attributes:
        head: gives the output head as it is now, prepared, adapted or packed: `model.get_output_embeddings`.
        compute: no elements; its dtype is that of the model's float parts, and follows their casts.
        embed_scale: what looked up rows are multiplied by (Gemma), or None.
    """

    head: Callable[[], nn.Module]
    compute: Tensor
    embed_scale: Tensor | None

    def __init__(
        self, head: Callable[[], nn.Module], dtype: torch.dtype, padding_idx: int | None, embed_scale: Tensor | None
    ) -> None:
        super().__init__()
        self.head, self.padding_idx = head, padding_idx
        self.register_buffer("compute", torch.empty(0, dtype=dtype), persistent=False)
        self.register_buffer("embed_scale", embed_scale, persistent=False)

    def scaled(self, rows: Tensor) -> Tensor:
        """Rows as the next layer gets them."""
        return rows if self.embed_scale is None else rows * self.embed_scale.to(rows.dtype)


def is_lookup(module: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether a module is a plain lookup, or one that multiplies its rows by `embed_scale`, and nothing else."""
    plain = type(module) is nn.Embedding and module.max_norm is None
    return plain or (isinstance(module, nn.Embedding) and isinstance(getattr(module, "embed_scale", None), Tensor))


def embed_scale_of(module: nn.Module) -> Tensor | None:
    """The factor of an embedding's rows; None for a plain embedding.

    Raises:
        LlmqatError: if it is neither a plain nor a scaled lookup.
    """
    if not is_lookup(module):
        raise LlmqatError(
            f"the output head is tied to a {type(module).__name__}, which llmqat cannot look up from codes; leave "
            "--lm-head-bits out"
        )
    scale = getattr(module, "embed_scale", None)
    return scale.detach().clone() if isinstance(scale, Tensor) else None


class FakeQuantEmbedding(_TiedEmbedding, KeepsDtypes):
    """Looks up rows of ``W_hat`` of the tied `FakeQuantLinear`, through its adapters if it has some.

    Attributes:
        weight: the head's Parameter, the same object.
    """

    def __init__(self, weight: nn.Parameter, *args: Any) -> None:
        super().__init__(*args)
        self.weight = weight

    @classmethod
    def from_embedding(cls, module: nn.Module, head: Callable[[], nn.Module], dtype: torch.dtype) -> Self:
        """Take the place of `module`, whose weight is that of `head`; looked up rows come in `dtype`.

        Raises:
            LlmqatError: see `embed_scale_of`.
        """
        scale = embed_scale_of(module)
        assert is_lookup(module)
        assert isinstance(module.weight, nn.Parameter)
        return cls(module.weight, head, dtype, module.padding_idx, scale).train(module.training)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids of any shape to ``(*ids.shape, in)``."""
        head: nn.Module = self.head()
        adapters = None
        if isinstance(head, LoraFakeQuantLinear):
            adapters, head = head.adapters(), head.base_layer
        assert isinstance(head, FakeQuantLinear)
        dtype = self.compute.dtype
        if not head.enabled:
            return self.scaled(self._float_rows(ids, adapters).to(dtype))
        latent, clip_mask = head.latent(adapters), head.clip_mask
        rows = fake_quant_embedding(ids, latent, head.grid, dtype, padding_idx=self.padding_idx, clip_mask=clip_mask)
        return self.scaled(rows)

    def _float_rows(self, ids: Tensor, adapters: Adapters | None) -> Tensor:
        """Rows of the float matrix, adapters beside it, in float32 or wider."""
        rows = embedding(ids, self.weight, self.padding_idx)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return rows if adapters is None else rows + adapters.scaling * (adapters.b[ids] @ adapters.a)

    def cast_rest(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Cast `compute` alone: the weight is the head's float32 master, and moves with it."""
        self.compute = fn(self.compute)


class PackedEmbedding(_TiedEmbedding):
    """Looks up rows in the codes of the tied `PackedLinear`, and dequantizes those alone; no weight of its own."""

    @classmethod
    def from_fake_quant(cls, module: FakeQuantEmbedding) -> Self:
        """The packed embedding that ships in the place of `module`."""
        return cls(module.head, module.compute.dtype, module.padding_idx, module.embed_scale)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids of any shape to ``(*ids.shape, in)``."""
        head = self.head()
        assert isinstance(head, PackedLinear)
        check_token_ids(ids, head.out_features)
        return self.scaled(head.rows(ids.flatten().long()).to(self.compute.dtype)).unflatten(0, ids.shape)
