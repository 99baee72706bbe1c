"""`attach`: the one place that patches a loaded packed model, so that it runs as fast as the machine can."""

from functools import partial
from typing import Literal

from transformers import PreTrainedModel

from llmqat.compat.native import why_not_recognised
from llmqat.errors import LlmqatError
from llmqat.kernels.pages import use_huge_pages
from llmqat.nn.context import check_inputs, position_limit
from llmqat.nn.kv_cache import kv_bits_of
from llmqat.nn.packed_linear import PackedLinear
from llmqat.progress import log
from llmqat.serve.activations import serve_int8_activations
from llmqat.serve.forward import accelerate_forward
from llmqat.serve.generate import accelerate_generate
from llmqat.serve.int8_cache import serve_int8_kv


def attach(model: PreTrainedModel, activations: Literal["int8"] | None = None, native: bool = True) -> PreTrainedModel:
    """Let a packed model run as fast as this machine can, in place.

    Args:
        model: filled, in evaluation mode and on its device; its keys and values on the grid where they were trained so.
        activations: "int8" quantizes those of a model that was trained without, for speed: no longer what was trained.
        native: False leaves blocks and sampling to the code of transformers.

    Returns:
        `model`.

    Raises:
        LlmqatError: if `activations` is unknown, or means nothing to this model.
    """
    if activations not in (None, "int8"):
        raise LlmqatError(f"activations must be 'int8', or left out for those of training; got {activations!r}")
    if kv_bits_of(model) is not None:
        serve_int8_kv(model)
    use_huge_pages([module for module in model.modules() if isinstance(module, PackedLinear)])
    if activations is not None:
        serve_int8_activations(model)
    model.register_forward_pre_hook(partial(check_inputs, position_limit(model)), with_kwargs=True)
    unknown = why_not_recognised()
    if native and unknown:
        log(f"packed models run through the code of transformers, not natively: {unknown}")
    elif native and accelerate_forward(model):
        accelerate_generate(model)
    return model
