"""Switch the quantizers of a model off, so that it runs on its float weights."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.kv_cache import KVQuantizer
from llmqat.nn.lora import LoraFakeQuantLinear

QUANTIZERS = FakeQuantLinear, KVQuantizer


@contextmanager
def disable_quantizers(model: nn.Module, disable_adapters: bool = True) -> Iterator[None]:
    """Layers on a grid run their plain float weight; without adapters too, unless `disable_adapters` is False.

    That is the float model only if the model was prepared with ``keep_float`` (or with round-to-nearest) and its float
    weights have not been trained.
    """
    kinds = (*QUANTIZERS, LoraFakeQuantLinear) if disable_adapters else QUANTIZERS
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, kinds):
                stack.callback(setattr, module, "enabled", module.enabled)
                module.enabled = False
        yield
