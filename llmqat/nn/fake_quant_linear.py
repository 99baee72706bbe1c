"""`FakeQuantLinear`: a linear layer on its integer grid, for training."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from llmqat.compat.torch import KeepsDtypes, in_backward
from llmqat.errors import LlmqatError
from llmqat.kernels import products
from llmqat.kernels.activations import static_activation
from llmqat.kernels.grid_rows import codes_of, count_clipped, fake_quantize
from llmqat.nn.dtensor import own_rows, row_shard
from llmqat.nn.fake_quant_function import fake_quant_linear
from llmqat.nn.linear_like import is_transposed
from llmqat.quant.affine import check_weight, choose_scale, fake_quantize_input, quotient, round_scale, store
from llmqat.quant.fake_quant import compute_dtype
from llmqat.quant.grid import Adapters, Compensation, Grid, Latent
from llmqat.quant.observers import initial_state, observe, observed_range
from llmqat.quant.row_shards import RowShard, whole_weight
from llmqat.scheme import QuantScheme

DEFAULT_OBSERVER = "mse"
OPTIONAL = ("code_scale", "compensation_multiples", "compensation_step")


class FakeQuantLinear(KeepsDtypes):
    """Linear layer whose forward runs on the grid of `scheme`, and whose weight is a float32 master where it trains.

    Not an `nn.Linear`, on purpose: libraries that treat one specially (a LoRA added beside the quantizer, a second
    quantization) must not take this layer for it.

    Attributes:
        weight: ``(out, in)``, the Parameter object of the layer it replaces: a float32 master; one that does not train
            may stay in the dtype in which it is stored, and is widened as it is used.
        bias: ``(out,)`` or None; that of the layer it replaces, too.
        scale: ``(out, groups)``, float32 where it trains, rounded to `storage_dtype` in each forward.
        zero_point: ``(out, groups)`` float32 holding integers, or None; not trained unless you ask.
        code_scale: ``(out, groups)`` or None: finds the codes in place of `scale` (see `decouple_scale`). A frozen
            Parameter, because FSDP2 shards no buffers.
        compensation: what GPTQ added to the weight (see `llmqat.prepare`, ``keep_float``), or None. Its tensors are
            frozen Parameters, too: `compensation_multiples` and `compensation_step`.
        name: its path in the model, for messages.
        enabled: False runs the plain float layer, without grid and compensation.
        holds_float: whether the weight is still that of the float model; see `llmqat.models.float_view`.
        act_scale: ``(1,)`` float32, of static int8 activations; None without, 0 as long as nothing was observed.
        observing: in training mode the range of static activations follows the inputs.
        has_range: whether the range of static activations is known to be there.
        transposed: the layer it replaced keeps its weight as ``(in, out)``, and so does its packed file.
    """

    code_scale: nn.Parameter | None
    compensation_multiples: nn.Parameter | None
    compensation_step: nn.Parameter | None
    holds_float = True
    name = "a layer"
    act_scale: Tensor | None
    act_state: Tensor | None

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        scheme: QuantScheme,
        storage_dtype: torch.dtype,
        clip_mask: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme, self.storage_dtype, self.clip_mask, self.enabled = scheme, storage_dtype, clip_mask, True
        self.transposed = False
        self.weight, self.bias = weight, bias
        groups = self.in_features // scheme.group_length(self.in_features)
        shape = (self.out_features, groups)
        self.scale = nn.Parameter(torch.ones(shape, dtype=torch.float32, device=weight.device))
        zero_point = None if scheme.symmetric else torch.zeros(shape, dtype=torch.float32, device=weight.device)
        self.zero_point = None if zero_point is None else nn.Parameter(zero_point, requires_grad=False)
        self.register_parameter("compensation_multiples", None)
        self.register_parameter("compensation_step", None)
        # Last, where the buffer that it once was had its place: the hash of a base, see `train.state`, is that of then.
        self.register_parameter("code_scale", None)
        self.set_observer(DEFAULT_OBSERVER)
        self.register_load_state_dict_pre_hook(_take_over_optional)

    def set_observer(self, kind: str) -> None:
        """Start to observe the range of static activations anew; see `llmqat.quant.observers`.

        Raises:
            LlmqatError: if there is no such observer.
        """
        state = initial_state(kind).to(self.weight.device)
        static = self.scheme.inputs == "static"
        self.observer, self.observing, self.has_range = kind, static, False
        self.register_buffer("act_state", state if static else None)
        self.register_buffer("act_scale", torch.zeros(1, device=self.weight.device) if static else None)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Let the range of static activations take `x` into account."""
        assert self.act_state is not None
        assert self.act_scale is not None
        self.act_state.copy_(observe(self.observer, self.act_state, x, self.name))
        magnitude = observed_range(self.observer, self.act_state)
        self.act_scale.copy_(store(quotient(magnitude, 127).float(), 0.0, self.storage_dtype))

    def stored_act_scale(self) -> Tensor | None:
        """The scale of static activations as it is stored, ``(1,)`` in `storage_dtype`, or None.

        Raises:
            LlmqatError: if nothing was observed yet.
        """
        if self.act_scale is None:
            return None
        if not (self.has_range or self.act_scale.is_meta):
            if not self.act_scale.all():
                raise LlmqatError(
                    f"static activations of {self.name} have no range yet; call llmqat.observe_activations(model, "
                    "batches) after prepare"
                )
            self.has_range = True  # looked at once: each look waits for the device
        return self.act_scale.to(self.storage_dtype)

    def quantized_input(self, x: Tensor) -> Tensor:
        """The input that the weight multiplies: `x` on the grid of the activations, if it has one; no gradient."""
        return fake_quantize_input(x, self.scheme, self.stored_act_scale())

    @classmethod
    def from_linear(
        cls, linear: nn.Module, scheme: QuantScheme, storage_dtype: torch.dtype, clip_mask: bool = False
    ) -> Self:
        """Take over the Parameters of `linear` (the objects, made ``(out, in)``, and float32 where they train) with
        round-to-nearest scales."""
        for parameter in linear.parameters():
            if parameter.requires_grad and parameter.dtype != torch.float64:
                parameter.data = parameter.data.float()
        weight, bias = linear.get_parameter("weight"), linear.bias
        assert bias is None or isinstance(bias, nn.Parameter)
        if is_transposed(linear):
            weight.data = weight.data.T.contiguous()
        module = cls(weight, bias, scheme, storage_dtype, clip_mask)
        module.transposed = is_transposed(linear)
        if not weight.is_meta:
            check_weight(weight, scheme, storage_dtype, "a linear layer")
            module.set_grid(*choose_scale(weight.detach(), scheme, storage_dtype))
        return module.train(linear.training)

    @torch.no_grad()
    def set_grid(self, scale: Tensor, zero_point: Tensor | None) -> None:
        """Put a new grid in place; codes follow the new scale."""
        self.scale.copy_(scale)
        if self.zero_point is not None and zero_point is not None:
            self.zero_point.copy_(zero_point)
        self.code_scale = self.compensation = None

    @property
    def compensation(self) -> Compensation | None:
        """The change of the weight by GPTQ, or None."""
        multiples, step = self.compensation_multiples, self.compensation_step
        return None if multiples is None or step is None else Compensation(multiples, step)

    @compensation.setter
    def compensation(self, change: Compensation | None) -> None:
        frozen = [None, None] if change is None else [nn.Parameter(tensor, requires_grad=False) for tensor in change]
        self.compensation_multiples, self.compensation_step = frozen

    def decouple_scale(self) -> None:
        """Find codes with today's scale from now on, so that training the scale moves none of them."""
        if self.code_scale is None:
            self.code_scale = nn.Parameter(self.stored_scale().float().clone(), requires_grad=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the latent weight, and so of adapters: peft asks a quantized layer for it by this name."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    @property
    def row_tensors(self) -> dict[str, nn.Parameter]:
        """The parameters with a row for each output, by name: what processes may divide, each with rows of its own."""
        names = ("weight", "scale", "zero_point", "compensation_multiples", "compensation_step", "code_scale")
        found = ((name, getattr(self, name)) for name in names)
        return {name: parameter for name, parameter in found if parameter is not None}

    @property
    def shard(self) -> RowShard | None:
        """The rows that this process holds, where processes divide them; None for all."""
        return row_shard(self.weight)

    def latent(self, adapters: Adapters | None = None) -> Latent:
        """The weight that is quantized; with adapters if given. What lies elsewhere comes to where the scale is."""
        shard, change, device = self.shard, self.compensation, self.scale.device
        change = None if change is None else Compensation(*(own_rows(tensor, shard).to(device) for tensor in change))
        return Latent(own_rows(self.weight, shard).to(device), change, adapters, shard)

    @property
    def grid(self) -> Grid:
        """The grid of the forward: scale and zero point as they train."""
        shard = self.shard
        zero_point = None if self.zero_point is None else own_rows(self.zero_point, shard)
        code_scale = None if self.code_scale is None else own_rows(self.code_scale, shard)
        return Grid(own_rows(self.scale, shard), zero_point, code_scale, self.scheme, self.storage_dtype)

    def stored_scale(self) -> Tensor:
        """The scale as it is stored, ``(out, groups)`` in `storage_dtype`."""
        return round_scale(self.scale.detach(), self.scheme, self.storage_dtype)

    def stored_zero_point(self) -> Tensor | None:
        """The zero point as it is stored, uint8 ``(out, groups)``, or None."""
        zero_point = self.grid.stored().zero_point
        return None if zero_point is None else zero_point.detach().to(torch.uint8)

    def codes(self, adapters: Adapters | None = None) -> Tensor:
        """The codes of this forward, ``(out, in)``: int8 if symmetric, else uint8; with adapters if given."""
        return codes_of(self.latent(adapters), self.grid)

    def clipped(self, adapters: Adapters | None = None) -> Tensor:
        """How many latent weights lie more than half a code beyond the ends of the grid, a scalar; with adapters if
        given."""
        return count_clipped(self.latent(adapters), self.grid)

    def quantized_weight(self) -> Tensor:
        """``W_hat`` of this forward, ``(out, in)`` in `storage_dtype`."""
        return fake_quantize(self.latent(), self.grid)

    def forward(self, x: Tensor, adapters: Adapters | None = None) -> Tensor:
        """``(..., in)`` to ``(..., out)``; adapters, if given, lie inside the quantizer."""
        if self.observing and self.training and not in_backward():
            self.observe(x)
        if not self.enabled:
            return self.float_forward(x, adapters)
        input_scale = self.stored_act_scale()
        if input_scale is not None:
            x = static_activation(x, input_scale)
        return fake_quant_linear(x, self.latent(adapters), self.grid, self.bias, clip_mask=self.clip_mask)

    def float_forward(self, x: Tensor, adapters: Adapters | None = None) -> Tensor:
        """The plain float layer, adapters beside it: no grid, no compensation."""
        # Casts of its own, not those of autocast: a weight stored in bfloat16 would be widened first.
        dtype = compute_dtype(x)
        x, bias = x.to(dtype), None if self.bias is None else self.bias.to(dtype)
        y = products.linear(x, whole_weight(own_rows(self.weight, self.shard), dtype, self.shard), bias)
        if adapters is None:
            return y
        a, b, scaling = adapters
        return y + scaling * nn.functional.linear(nn.functional.linear(x, a.to(dtype)), b.to(dtype))

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.scheme}"


def _take_over_optional(layer: FakeQuantLinear, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a layer have `code_scale` and `compensation` where the state that it loads has them, and only there; and
    weight and scale that are as wide as those that it loads; its range is looked for again. A state without the layer
    (of adapters) changes none."""
    if f"{prefix}scale" not in state_dict:
        return
    layer.has_range = False
    for name, own in (("weight", layer.weight), ("scale", layer.scale)):
        loaded = state_dict.get(prefix + name)
        if loaded is not None and loaded.dtype != own.dtype:
            own.data = own.data.to(torch.promote_types(own.dtype, loaded.dtype))
    device, found = layer.weight.device, [state_dict.get(prefix + name) for name in OPTIONAL]
    code_scale, multiples, step = (None if value is None else value.to(device) for value in found)
    layer.code_scale = None if code_scale is None else nn.Parameter(code_scale, requires_grad=False)
    layer.compensation = None if multiples is None or step is None else Compensation(multiples, step)
