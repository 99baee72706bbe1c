"""What tests of latents share: a change of the weight as GPTQ leaves it."""

import torch

from llmqat.quant.grid import Compensation


def random_change(rows, columns, group_size, size, device="cpu"):
    """A `Compensation` of about `size` in each entry."""
    step = (size / 40 * (0.5 + torch.rand(rows, columns // group_size))).to(torch.bfloat16)
    multiples = (40 * torch.randn(rows, columns)).round().clamp(-127, 127).to(torch.int8)
    return Compensation(multiples.to(device), step.to(device))
