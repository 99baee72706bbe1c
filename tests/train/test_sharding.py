import pytest
from torch import nn

from llmqat.errors import LlmqatError
from llmqat.train import sharding


def test_8_bit_optimizers_are_refused_under_fsdp2(monkeypatch):
    monkeypatch.setattr(sharding, "sharding_requested", lambda: True)
    with pytest.raises(LlmqatError, match=r"adamw8bit does not run under FSDP2: bitsandbytes updates whole"):
        sharding.prepare_model(None, nn.Linear(2, 2), [], None, "adamw8bit")
