"""The host waits for the device once a step: each number that it reads lets the device run dry."""

from collections import Counter
from importlib.util import find_spec

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import masking_utils

from llmqat.kernels import training
from llmqat.kernels.gpu import available
from llmqat.train import loop
from llmqat.train.loop import Trainer, TrainingData

READ = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class Reads(TorchDispatchMode):
    """Counts the operators that on a device give the host a number, or a shape that depends on numbers."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func in READ or by_mask:
            self.counts[str(func)] += 1
        return func(*args, **kwargs or {})

    def total(self):
        return sum(self.counts.values())


def talks(rows, length=16):
    ids = torch.randint(0, 128, (rows, length), generator=torch.Generator().manual_seed(3))
    answers = torch.arange(length) > torch.arange(rows).remainder(length - 4)[:, None] + 2
    return torch.stack([ids, torch.where(answers, ids, -100)], 1)


@pytest.fixture
def trainer(prepared, train_config, mode, monkeypatch):
    """``trainer(rows)``: of a run with hidden states, clipped gradients and two batches a step, its first step done.

    Out of sight are what reads the batches, which stay on the CPU, and what transformers reads once a forward, to see
    whether sequences are packed. The kernels of a CPU, which no device has, are off.
    """
    monkeypatch.setenv(training.SWITCH, "torch")

    def unseen(function):
        def call(*args):
            with _disable_current_modes():
                return function(*args)

        return call

    for name in ("unstack", "places", "positions", "token_count"):
        monkeypatch.setattr(loop, name, unseen(getattr(loop, name)))
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda position_ids: None)

    def make(rows):
        run, config = prepared(mode), train_config(mode, accumulation=2, batch_size=2, max_grad_norm=1.0)
        trainer = Trainer(run.model, TrainingData(rows, rows[:6]), config, run.teacher)
        trainer.step(iter(rows.split(2)))
        return trainer

    return make


@pytest.mark.parametrize("rows", [torch.arange(160).view(10, 16) % 128, talks(10)], ids=["text", "conversations"])
def test_a_step_reads_one_number(trainer, rows):
    running = trainer(rows)
    with Reads() as seen:
        running.step(iter(rows.split(2)))
    assert seen.total() == 1, seen.counts


@pytest.mark.skipif(find_spec("triton") is None, reason="triton has wheels for Linux alone")
@pytest.mark.parametrize("mode", ["scales"])
def test_a_step_by_the_kernels_of_gpus_reads_one_number(trainer, mode, monkeypatch):
    rows = talks(10, length=6)
    running = trainer(rows)
    monkeypatch.setenv(training.SWITCH, "")
    monkeypatch.setattr(training, "library", lambda: None)
    monkeypatch.setattr(available, "runs_on", lambda device: True)
    with Reads() as seen:
        running.step(iter(rows.split(2)))
    assert seen.total() == 1, seen.counts


def test_held_out_losses_and_counts_of_codes_are_read_in_one_piece(trainer):
    """By `tolist`, which is no operator: nothing is read by batch, layer or chunk of rows."""
    rows = torch.arange(160).view(10, 16) % 128
    running = trainer(rows)
    with Reads() as seen:
        running.held_out_loss()
        running.count_codes(1)
    assert seen.total() == 0, seen.counts
