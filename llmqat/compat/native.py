"""Whether the native path recognises the libraries around it; where it does not, transformers runs the model."""

import inspect
from importlib.metadata import version

from transformers import GenerationMixin

import llmqat.compat.torch
import llmqat.compat.transformers  # noqa: F401 - both register what the native path leans on
from llmqat.compat.caches import unknown_caches
from llmqat.compat.register import REGISTER


def why_not_recognised() -> str:
    """Why the native path does not recognise the installed transformers or torch; empty if it does."""
    if "custom_generate" not in inspect.signature(GenerationMixin.generate).parameters:
        return f"generate of transformers {version('transformers')} takes no custom_generate"
    missing = (reliance.missing() for reliance in REGISTER if reliance.native)
    return next(filter(None, missing), unknown_caches())
