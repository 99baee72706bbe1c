import sys

import pytest
import torch

from llmqat.config import OPTIMIZERS
from llmqat.errors import LlmqatError
from llmqat.train.optimizers import make_optimizer


def groups():
    sizes = {"large": (64, 128), "small": (8, 8)}
    return [{"params": [torch.nn.Parameter(torch.ones(size))], "lr": 0.1} for size in sizes.values()]


def descend(optimizer, steps=3):
    for _ in range(steps):
        sum(p.square().sum() for group in optimizer.param_groups for p in group["params"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [group["params"][0].detach() for group in optimizer.param_groups]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_descend_alike(name):
    """The same betas, and no weight decay: three steps of a smooth loss agree within the 8 bits of the moments."""
    expected = descend(torch.optim.AdamW(groups(), betas=(0.9, 0.95), weight_decay=0.0))
    for value, wanted in zip(descend(make_optimizer(name, groups())), expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=0.02, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS[1:])
def test_moments_take_a_byte_where_it_counts(name):
    optimizer = make_optimizer(name, groups())
    descend(optimizer)
    large, small = (optimizer.state[group["params"][0]] for group in optimizer.param_groups)
    assert (large["state1"].dtype, large["state2"].dtype) == (torch.uint8, torch.uint8)
    assert small["state1"].dtype == torch.float32


def test_paging_without_a_device_is_said(capsys):
    make_optimizer("paged_adamw8bit", groups())
    assert "without a CUDA device it is adamw8bit" in capsys.readouterr().err


def test_bitsandbytes_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = (
        r"--optimizer adamw8bit needs bitsandbytes: pip install 'llmqat\[bitsandbytes\]', or use --optimizer adamw"
    )
    with pytest.raises(LlmqatError, match=message):
        make_optimizer("adamw8bit", groups())
    assert make_optimizer("adamw", groups()).defaults["fused"]
