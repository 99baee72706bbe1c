"""`PackedLinear`: the layer that ships. Its state dict is the file format, but for `Conv1D` (formats/conv1d.py)."""

from typing import Self

import torch
from torch import Tensor, nn

from llmqat.compat.torch import KeepsDtypes, buffers_of
from llmqat.kernels import native, ops
from llmqat.kernels.activations import fake_quantize_static
from llmqat.kernels.packed import Packed, check_index, check_range
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.quant.affine import dequantize
from llmqat.quant.packing import pack_rows, packed_width, to_unsigned, unpack_at
from llmqat.scheme import QuantScheme


class PackedLinear(KeepsDtypes):
    """Linear layer on packed codes, run by the operator ``llmqat::packed_linear``. Inference only.

    Attributes:
        weight_packed: int32 ``(out, ceil(in * bits / 32))``.
        weight_scale: ``(out, groups)`` in its storage dtype, whatever the model is cast to.
        weight_zero_point: int32 ``(ceil(out * bits / 32), groups)``, packed along `out`, or None.
        weight_shape: int64, ``[out, in]``.
        bias: ``(out,)`` or None.
        input_scale: ``(1,)``, of static int8 activations, or None.
        stored_transposed: whether the file holds it in the layout of `Conv1D` (llmqat/formats/conv1d.py).
        trained_scheme: what it was trained with, where it runs another one (llmqat/serve/activations.py).
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_shape: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    trained_scheme: QuantScheme | None = None
    stored_transposed: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scheme: QuantScheme,
        storage_dtype: torch.dtype,
        bias: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        groups = in_features // scheme.group_length(in_features)
        words, zero_words = packed_width(in_features, scheme.bits), packed_width(out_features, scheme.bits)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        self.register_buffer("weight_packed", empty(out_features, words, dtype=torch.int32))
        self.register_buffer("weight_scale", empty(out_features, groups, dtype=storage_dtype))
        zero_point = None if scheme.symmetric else empty(zero_words, groups, dtype=torch.int32)
        self.register_buffer("weight_zero_point", zero_point)
        self.register_buffer("weight_shape", torch.tensor([out_features, in_features], device=device))
        self.register_buffer("bias", empty(out_features, dtype=storage_dtype) if bias else None)
        self.register_buffer("input_scale", empty(1, dtype=storage_dtype) if scheme.inputs == "static" else None)

    @classmethod
    @torch.no_grad()
    def from_fake_quant(cls, module: FakeQuantLinear, codes: Tensor) -> Self:
        """Pack `codes` ``(out, in)``, those of `module`'s forward, with its scales; nothing is quantized again."""
        scheme, bits = module.scheme, module.scheme.bits
        packed = cls(
            module.in_features, module.out_features, scheme, module.storage_dtype, module.bias is not None, "meta"
        )
        packed.weight_packed = pack_rows(to_unsigned(codes, scheme), bits)
        packed.weight_scale = module.stored_scale().clone()
        packed.weight_shape = torch.tensor([module.out_features, module.in_features], device=codes.device)
        zero_point = module.stored_zero_point()
        if zero_point is not None:
            packed.weight_zero_point = pack_rows(zero_point.T.contiguous(), bits).T.contiguous()
        packed.bias = None if module.bias is None else module.bias.detach().to(module.storage_dtype, copy=True)
        packed.input_scale = module.stored_act_scale()
        return packed

    def unpack(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes ``(out, in)``, scale ``(out, groups)`` and zero point ``(out, groups)`` or None."""
        packed = self.packed
        return packed.unpack(), packed.scale, packed.unpack_zero_point()

    def unsigned(self) -> tuple[Tensor, Tensor, Tensor]:
        """Codes and zero points as uint8 from 0, as files hold them, and between them the scale."""
        codes, scale, zero_point = self.unpack()
        if zero_point is None:
            zero_point = torch.full(scale.shape, -self.scheme.qmin, dtype=torch.uint8, device=scale.device)
        return to_unsigned(codes, self.scheme), scale, zero_point

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` ``(n,)`` of ``W_hat``, ``(n, in)`` in the dtype of the scale: the lookup of a tied embedding."""
        check_index(index, self.packed)
        check_range(index, self.packed)
        if native.supports(self.weight_scale, self.weight_scale, self.in_features):
            return native.Layer(self.packed).rows(index)
        gpu = ops.gpu_kernels(self.weight_scale, self.packed)
        if gpu is not None:
            looked_up: Tensor = gpu.dequantize(self.packed, self.weight_scale.dtype, index)
            return looked_up
        zero_point = self.weight_zero_point
        if zero_point is not None:
            zero_point = unpack_at(zero_point.T, self.scheme.bits, index).T
        return dequantize(self.packed.unpack(index), self.weight_scale[index], zero_point, self.scheme)

    @property
    def packed(self) -> Packed:
        """The layer as the operator takes it; static activations are quantized before, by `forward`."""
        own, scheme = buffers_of(self), self.scheme
        act_bits = scheme.act_bits if own["input_scale"] is None else None
        codes, scale = own["weight_packed"], own["weight_scale"]
        assert codes is not None
        assert scale is not None
        return Packed(codes, scale, own["weight_zero_point"], own["bias"], scheme.bits, self.in_features, act_bits)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)`` in the dtype of `x`."""
        input_scale = buffers_of(self)["input_scale"]
        if input_scale is not None:
            x = fake_quantize_static(x, input_scale)
        y: Tensor = ops.packed_linear(x, self.packed)
        return y

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Every packed layer of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
