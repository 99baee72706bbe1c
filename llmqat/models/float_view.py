"""Run the float model inside a prepared one: the teacher of distillation without a second copy."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmqat.models.patcher import float_parameters
from llmqat.nn.dtensor import local_shard, sharded_like
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.quantizers import QUANTIZERS, disable_quantizers


def holds_float(model: nn.Module) -> bool:
    """Whether the float model that a model was prepared from is still inside it, for a `FloatView`.

    It is not after GPTQ without ``keep_float``, and after training the weights themselves.
    """
    return all(layer.holds_float for layer in model.modules() if isinstance(layer, FakeQuantLinear))


def mark_float_lost(model: nn.Module) -> None:
    """Remember that the weights of a prepared model are no longer those that it was prepared from."""
    for layer in model.modules():
        if isinstance(layer, FakeQuantLinear):
            layer.holds_float = False


class FloatView:
    """The float model inside a prepared model, also while a few of its small float parameters train.

    Parameters that train and are no part of a quantizer (norms) are remembered at construction, and put back while the
    view runs: ``with view.active() as float_model``.

    Args:
        model: prepared with ``keep_float=True``, or by rounding to nearest; its float weights do not train.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        names = {id(p): name for name, p in model.named_parameters()}
        self.originals: dict[str, Tensor] = {
            names[id(p)]: p.detach().clone() for p in float_parameters(model) if p.requires_grad
        }

    @contextmanager
    def active(self, part: nn.Module | None = None) -> Iterator[nn.Module]:
        """The float model, in evaluation mode, without gradients; or `part` of it, the rest staying as it is."""
        module = self.model if part is None else part
        inside, training = {id(p) for p in module.parameters()}, module.training
        current = {}
        module.eval()
        try:
            for name, original in self.originals.items():
                parameter = self.model.get_parameter(name)
                if id(parameter) in inside:
                    current[name] = local_shard(parameter).clone()
                    local_shard(parameter).copy_(local_shard(sharded_like(original, parameter)))
            with disable_quantizers(module), torch.no_grad():
                yield module
        finally:
            for name, value in current.items():
                local_shard(self.model.get_parameter(name)).copy_(value)
            module.train(training)


def copy_of_float(model: nn.Module) -> "FloatCopy":
    """The float model inside a prepared one, of which nothing trains yet, as a model of its own.

    Weights in 16 bits are not copied: those that will train are made float32 in the prepared one, and no longer these.
    """
    shared = {id(p): nn.Parameter(p.data, requires_grad=False) for p in model.parameters() if p.dtype.itemsize < 4}
    copied = copy.deepcopy(model, shared)
    for module in copied.modules():
        if isinstance(module, QUANTIZERS):
            module.enabled = False
    return FloatCopy(copied)


class FloatCopy:
    """The float model as a second, frozen copy: for full fine-tuning, where the weights themselves move.

    Args:
        model: the copy, not prepared or with its quantizers disabled; its parameters are frozen in place.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model.eval().requires_grad_(False)

    @contextmanager
    def active(self, part: nn.Module | None = None) -> Iterator[nn.Module]:
        """The float model or `part` of it, without gradients."""
        with torch.no_grad():
            yield self.model if part is None else part
