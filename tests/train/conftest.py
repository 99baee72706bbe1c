"""Tiny prepared models for the training tests."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from llmqat.config import ResolvedTrain, from_dict, resolve
from llmqat.models.float_view import FloatCopy, FloatView
from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme
from llmqat.train.loop import TrainingData
from llmqat.train.modes import add_lora, select_trainable


@pytest.fixture
def train_config() -> Callable[..., ResolvedTrain]:
    """``train_config(mode, **fields)``: small steps in float32."""

    def make(mode: str, **fields: object) -> ResolvedTrain:
        small = {"max_steps": 4, "batch_size": 4, "precision": "fp32", "eval_every": 2, "save_every": 2}
        static = {"act_bits": 8, "act_static": True} if "freeze_observers" in fields else {}
        return resolve(from_dict({"quant": static, "train": {**small, "mode": mode, **fields}}), 1).train

    return make


@pytest.fixture
def prepared(tiny_llama) -> Callable[..., SimpleNamespace]:
    """``prepared(mode)``: a model ready to train in `mode`, its teacher, and tokens to train and to hold out."""

    def make(mode: str, bits: int = 3, dtype: torch.dtype = torch.float32, lr_scale: bool = True) -> SimpleNamespace:
        model = tiny_llama(num_hidden_layers=1)
        teacher = FloatCopy(tiny_llama(num_hidden_layers=1))
        prepare(model, QuantScheme(bits, 32), storage_dtype=dtype)
        if mode == "lora":
            model = add_lora(model, 4)
        select_trainable(model, mode, lr_scale)
        if mode != "full":
            teacher = FloatView(model)
        ids = torch.randint(0, 128, (20, 16), generator=torch.Generator().manual_seed(1))
        return SimpleNamespace(model=model, teacher=teacher, data=TrainingData(ids[:14], ids[14:]))

    return make


@pytest.fixture(params=["full", "lora", "scales"])
def mode(request: pytest.FixtureRequest) -> str:
    return request.param
