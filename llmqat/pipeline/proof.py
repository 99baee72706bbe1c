"""The end of a run: the packed model is loaded, scored and proved, while what was trained makes room for it."""

from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import Checked, Expected, Verification, check_loaded
from llmqat.machine import return_freed_memory
from llmqat.mapped import Disk
from llmqat.metrics.float_pass import FloatPasses
from llmqat.metrics.perplexity import Perplexity
from llmqat.progress import log


def put_aside(models: Iterable[nn.Module], stay: Iterable[nn.Module], directory: Path) -> None:
    """Leave the matrices of models on the disk, from where they are read when they run: not to be written to.

    Not in the memory of the host, which may be no larger than that of its GPU. Vectors stay, since a `FloatView` puts
    the values of norms back and forth.

    Args:
        models: the trained one and the float one, which may share tensors.
        stay: modules whose tensors stay where they are.
        directory: of the run; what it has no room for stays where it is.
    """
    disk = Disk(directory)
    kept = {id(tensor) for module in stay for tensor in _tensors(module)}
    moved: dict[tuple[object, ...], Tensor] = {}
    for tensor in {id(tensor): tensor for model in models for tensor in _tensors(model)}.values():
        if id(tensor) in kept or tensor.ndim < 2:
            continue
        place = tensor.data_ptr(), tensor.dtype, tensor.shape
        try:
            tensor.data = moved[place] = moved[place] if place in moved else disk.put(tensor)
        except LlmqatError as error:  # no reason to fail now
            log(f"{error}; the rest of the trained model stays in memory while the packed one is proved")
            return


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    return chain(module.parameters(), module.buffers())


def prove(
    directory: Path, expected: Expected, float_pass: FloatPasses, device: torch.device, low_memory: bool
) -> tuple[Perplexity, Verification]:
    """Load the packed model of a run, score it through the operator of the kernels, and verify it.

    Args:
        directory: of the run.
        expected: to be found there.
        float_pass: that rows are compared with.
        device: that runs all of them.
        low_memory: leave codes in their files; the matrices of the trained model are in files already.

    Returns:
        its row of the scoreboard, and the proof.
    """
    trained = expected.trained
    assert trained is not None
    if not low_memory:
        put_aside((trained, float_pass.reference.model), float_pass.compared_with(), directory)
    return_freed_memory()
    row, checked = _check(directory, expected, float_pass, device, low_memory)
    return_freed_memory()
    return row, checked.judged_by(trained if low_memory else trained.to(device))


def _check(
    directory: Path, expected: Expected, float_pass: FloatPasses, device: torch.device, mapped: bool
) -> tuple[Perplexity, Checked]:
    packed = load_packed(directory, torch.float32, device, mapped=mapped)
    row = float_pass.compare(packed, "perplexity, packed", watch=False)
    return row, check_loaded(directory, packed, expected)
