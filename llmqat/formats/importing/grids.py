"""`FoundLayer`: a layer of a checkpoint on its grid, and the tensors of a packed directory that it becomes."""

from collections.abc import Collection, Mapping
from typing import NamedTuple, Self

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.formats import fingerprint
from llmqat.quant.affine import holds_exactly
from llmqat.quant.packing import from_unsigned, pack_rows
from llmqat.scheme import QuantScheme

FLOATS = (torch.float16, torch.bfloat16, torch.float32)  # that scales may have
AGAIN = "copy or download the checkpoint again"


class FoundLayer(NamedTuple):
    """A layer of a checkpoint.

    Attributes:
        scheme: its grid.
        codes: ``(out, in)``, uint8 from 0.
        scale: ``(out, groups)`` as the checkpoint has it.
        zero_point: ``(out, groups)`` uint8; None for a symmetric grid.
    """

    scheme: QuantScheme
    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def stored_in(self, dtype: torch.dtype) -> Self:
        """The layer with scales in the dtype of the model, if that holds all of them exactly; as it is, if not."""
        return self._replace(scale=self.scale.to(dtype)) if holds_exactly(dtype, self.scale) else self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the packed file, by the last part of their names; see `PackedLinear`."""
        bits = self.scheme.bits
        found = {
            "weight_packed": pack_rows(self.codes, bits),
            "weight_scale": self.scale.contiguous(),
            "weight_shape": torch.tensor(self.codes.shape),
        }
        if self.zero_point is not None:
            found["weight_zero_point"] = pack_rows(self.zero_point.T.contiguous(), bits).T.contiguous()
        return found

    def hashes(self) -> dict[str, str | None]:
        """Hashes for the fingerprint, as of what was trained."""
        return fingerprint.layer_hashes(from_unsigned(self.codes, self.scheme), self.scale, self.zero_point, None)


def part(tensors: Mapping[str, Tensor], name: str, dtypes: Collection[torch.dtype], shape: tuple[int, ...]) -> Tensor:
    """The tensor of a layer, as a format has it; -1 in `shape` stands for any size.

    Raises:
        LlmqatError: if it is missing, or is something else.
    """
    tensor = tensors.get(name)
    if tensor is None:
        raise LlmqatError(f"the checkpoint lacks {name}; {AGAIN}")
    fits = len(tensor.shape) == len(shape) and all(b in (-1, a) for a, b in zip(tensor.shape, shape, strict=True))
    if tensor.dtype not in dtypes or not fits:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise LlmqatError(f"{name} is {found}, and has to be {wanted} {list(shape)}; {AGAIN}")
    return tensor


def group_size_of(columns: int, groups: int, said: int, name: str) -> int:
    """The group size of a layer, by what the config says and what its scales are.

    Raises:
        LlmqatError: if the two do not agree.
    """
    length = columns if said == -1 else said
    if length < 1 or groups * length != columns:
        raise LlmqatError(
            f"{name} has {groups} groups in rows of {columns}, and the config says {said} weights in each; {AGAIN}"
        )
    return said
