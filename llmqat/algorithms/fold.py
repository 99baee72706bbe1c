"""Move a scale from the channels a layer writes to the layers that read them, leaving the float model as it was.

    written /= s          read[..., :] *= s

Exact where nothing else reads those channels and everything between writer and readers commutes with a positive scale:
nothing at all (norm -> linears), averaging over tokens (attention: value -> output projection), a product with another
tensor (gate * up -> down), or ReLU.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmqat.errors import LlmqatError
from llmqat.scheme import QuantScheme

# Power-of-two folding commutes with rounding, so logits differ by underflow and by nothing else.
TOLERANCE = 1e-5


@dataclass(frozen=True, eq=False)
class Fold:
    """Channels between a writer and its readers, found in a model. All tensors are views into its parameters.

    Attributes:
        name: path of the writer.
        written: ``(channels, ...)``, divided by s: weight and bias of a norm, or rows of a linear and of its bias.
        read: ``(out, inputs)``, multiplied by s along the last dimension.
        schemes: the grid that each of `read` will be put on; None for one that stays float.
        observed: a module whose input is those channels.
        queries: query heads that read one key/value head; 1 unless `written` are value heads. ``inputs = channels *
            queries``, and all query heads of a key/value head share its scale.
        head_dim: channels of a head.
        offset: the norm multiplies by ``offset + weight`` (Gemma: 1).
    """

    name: str
    written: tuple[Tensor, ...]
    read: tuple[Tensor, ...]
    schemes: tuple[QuantScheme | None, ...]
    observed: nn.Module
    queries: int = 1
    head_dim: int = 1
    offset: float = 0.0

    def spread(self, s: Tensor) -> Tensor:
        """A value per channel ``(channels,)`` to a value per input of the readers, ``(inputs,)``."""
        return s.unflatten(0, (-1, self.head_dim)).repeat_interleave(self.queries, 0).flatten()

    def largest(self, x: Tensor) -> Tensor:
        """A value per input ``(inputs,)`` to a value per channel ``(channels,)``: the largest among the query heads."""
        return x.unflatten(0, (-1, self.queries, self.head_dim)).amax(1).flatten()

    def weight_absmax(self) -> Tensor:
        """Largest magnitude of each channel's columns in the readers that will be quantized, ``(channels,)``."""
        weights = [w for w, scheme in zip(self.read, self.schemes, strict=True) if scheme is not None] or list(
            self.read
        )
        return self.largest(torch.stack([w.abs().amax(0).float() for w in weights]).amax(0))

    def representable(self, s: Tensor, dtype: torch.dtype) -> Tensor:
        """The scale nearest to `s` whose folded norm weight is stored in `dtype` without rounding, ``(channels,)``.

        A power of two already is one, unless the norm adds an offset. Then ``w' = (offset + w) / s - offset`` is
        rounded first, and the scale that the readers get is the quotient of what the norm multiplies by.
        """
        if not self.offset:
            return s
        before = self.offset + self.written[0].float()
        after = self.offset + (before / s - self.offset).to(dtype).float()
        return torch.where((before != 0) & (after != 0), before / after, torch.ones_like(s))

    @torch.no_grad()
    def apply(self, s: Tensor) -> None:
        """Fold ``s (channels,)``; it must be `representable`."""
        for tensor in self.written:
            shaped = s.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))
            if self.offset:
                tensor.copy_((self.offset + tensor) / shaped - self.offset)
            else:
                tensor.div_(shaped)
        columns = self.spread(s)
        for weight in self.read:
            weight.mul_(columns.to(weight.dtype))

    def check_dtype(self) -> None:
        """Refuse a fold that would round weights.

        Raises:
            LlmqatError: if the norm has an offset and a weight has less precision than float32.
        """
        low = [t.dtype for t in (*self.written, *self.read) if torch.finfo(t.dtype).bits < 32]
        if self.offset and low:
            raise LlmqatError(
                f"{self.name} multiplies by {self.offset:g} + weight: smoothing it is exact in float32, not in "
                f"{str(low[0]).removeprefix('torch.')}; load the model with dtype=torch.float32"
            )


@torch.no_grad()
def apply_checked(model: nn.Module, site: str, scales: Mapping[Fold, Tensor], probe: Tensor, before: Tensor) -> float:
    """Fold the `scales` of a site, one of each expert for example, and compare the float logits on `probe` with those
    `before`.

    Returns:
        the largest change, relative to the largest logit.

    Raises:
        LlmqatError: if it is more than `TOLERANCE`; every tensor is put back first.
    """
    saved = [(tensor, tensor.clone()) for fold in scales for tensor in (*fold.written, *fold.read)]
    for fold, s in scales.items():
        fold.apply(s)
    after = model(input_ids=probe, use_cache=False).logits
    change = float((after - before).abs().max() / before.abs().max())
    if not change <= TOLERANCE:
        for tensor, old in saved:
            tensor.copy_(old)
        raise LlmqatError(
            f"smoothing {site} changed the float logits by {change:.1e} of their largest (limit {TOLERANCE:.0e}): "
            "something else reads what it writes; leave --smooth out for this model, or mend its sites in "
            "models/smooth_sites.py"
        )
    return change
