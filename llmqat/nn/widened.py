"""The ends of a model, input embedding and output head, that keep their weight in the dtype in which it is stored.

They compute in float32, like the model between them: the weight is widened as it is used, of the embedding the rows
that are looked up. That is half the bytes of what may be the largest matrices of a model.
"""

from typing import Self

from torch import Tensor, nn
from torch.nn.functional import linear

from llmqat.nn.embedding import embed_scale_of
from llmqat.quant.fake_quant import compute_dtype


class WidenedEmbedding(nn.Embedding):
    """Looks up rows in float32, whatever the dtype of the weight.

    Attributes:
        weight: the Parameter of the embedding that it replaces, which the output head may share.
        embed_scale: what rows are multiplied by once they are float32 (Gemma), or None.
    """

    embed_scale: Tensor | None

    @classmethod
    def from_embedding(cls, module: nn.Embedding) -> Self:
        """Take the place of `module`.

        Raises:
            LlmqatError: see `embed_scale_of`.
        """
        scale = embed_scale_of(module)
        new = cls(module.num_embeddings, module.embedding_dim, module.padding_idx, device="meta")
        new.weight = module.weight
        new.register_buffer("embed_scale", scale, persistent=False)
        return new.train(module.training)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids of any shape to ``(*ids.shape, hidden)``."""
        rows = super().forward(ids).float()
        return rows if self.embed_scale is None else rows * self.embed_scale.float()


class WidenedLinear(nn.Linear):
    """Computes in the dtype of its input, or in that of autocast, whatever the dtype of its weight.

    Attributes:
        weight: the Parameter of the layer that it replaces, which the input embedding may share.
    """

    @classmethod
    def from_linear(cls, module: nn.Linear) -> Self:
        """Take the place of `module`."""
        new = cls(module.in_features, module.out_features, bias=False, device="meta")
        new.weight, new.bias = module.weight, module.bias
        return new.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        dtype = compute_dtype(x)
        return linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
