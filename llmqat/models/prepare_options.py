"""`PrepareOptions`: what `llmqat.prepare` takes by name beside the scheme, its starting point and the data."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Self

import torch

from llmqat.config.options import check_value, meta, shown
from llmqat.errors import LlmqatError
from llmqat.models.planning import Overrides
from llmqat.nn.fake_quant_linear import DEFAULT_OBSERVER
from llmqat.nn.kv_cache import check_kv_bits
from llmqat.quant.observers import check_observer

SHARE = meta("", least=0.0, most=1.0)


@dataclass(frozen=True)
class PrepareOptions:
    """The options of `llmqat.prepare` and their defaults; give them to it by name.

    Attributes:
        overrides: regular expression on layer names -> ``{"bits": 8}`` and the like, or ``"float"``.
        storage_dtype: dtype of scales and float parts in the packed file; None for that of the files that
            `llmqat.load_float` read, else that of the model.
        damp: GPTQ's damping, as a fraction of the mean diagonal of the Hessian.
        block_steps: training steps for each block, of ``init="blockwise"``.
        clip_mask: stop the gradient of weights beyond the ends of the grid.
        keep_float: GPTQ keeps its change apart, in the storage dtype, so that `llmqat.FloatView` can run the float
            model.
        lm_head_bits: quantize the output head too, at these bits; a tied embedding then looks up rows of its grid.
        kv_bits: 8 quantizes keys and values as the cache stores them; None leaves them float.
        observer: how static activation ranges are found: minmax, moving_average, percentile or mse; on the calibration
            data if there is any, and while training.
        min_coverage: least share of the block parameters that must lie in layers llmqat can quantize.

    Raises:
        LlmqatError: if a value is of the wrong type or out of range.
    """

    overrides: Overrides | None = None
    storage_dtype: torch.dtype | None = None
    damp: float = 0.01
    block_steps: int = 200
    clip_mask: bool = False
    keep_float: bool = False
    lm_head_bits: int | None = None
    kv_bits: int | None = None
    observer: str = DEFAULT_OBSERVER
    min_coverage: float = 0.9

    def __post_init__(self) -> None:
        if self.overrides is not None and not isinstance(self.overrides, Mapping):
            raise LlmqatError(f"overrides must be a mapping, pattern -> change; got {shown(self.overrides)}")
        dtype = self.storage_dtype
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise LlmqatError(f"storage_dtype must be a float dtype such as torch.bfloat16, got {shown(dtype)}")
        check_value(float, self.damp, "damp", meta("", least=0.0))
        check_value(int, self.block_steps, "block_steps", meta("", least=1))
        check_value(bool, self.clip_mask, "clip_mask", meta(""))
        check_value(bool, self.keep_float, "keep_float", meta(""))
        check_value(float, self.min_coverage, "min_coverage", SHARE)
        if self.kv_bits is not None:
            check_kv_bits(self.kv_bits)
        check_observer(self.observer)

    @classmethod
    def by_name(cls, options: Mapping[str, Any]) -> Self:
        """The options of a call.

        Raises:
            LlmqatError: if there is no option of a name, or a value is wrong.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = get_close_matches(name, known, n=1, cutoff=0.5)
                remedy = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
                raise LlmqatError(f"prepare has no option {shown(name)}; {remedy}")
        return cls(**options)
