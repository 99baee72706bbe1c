"""The state of training: the tensors that steps change, and the hash of what those stand on."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.errors import LlmqatError
from llmqat.files import make_directory
from llmqat.mapped import Disk, release
from llmqat.nn.dtensor import gathered, local_shard
from llmqat.train.checkpoint import REMEDY


def moving_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a prepared model that training changes, by name: all of it that a checkpoint has to hold."""
    return {name: tensor.detach() for name, tensor in _tensors_of(model).items() if _moves(tensor)}


def hash_of_base(model: nn.Module, codes: dict[str, Tensor]) -> str:
    """SHA-256 of what training stands on, and a resumed run has to make again: all frozen tensors, and the `codes`."""
    frozen = {name: tensor for name, tensor in _tensors_of(model).items() if not _moves(tensor)}
    return hash_of_tensors(frozen | {f"codes of {layer}": tensor for layer, tensor in codes.items()})


def check_base(saved: str, found: str, directory: Path) -> None:
    """A trained state belongs to the base it was trained on.

    Raises:
        LlmqatError: if the base that this process made is another.
    """
    if saved != found:
        raise LlmqatError(
            f"--resume: the prepared model is not the one that the training in {directory} began with: GPTQ was run "
            "again because its saved blocks are gone, or another machine or version rounds otherwise; go on where it "
            f"began, or {REMEDY}"
        )


def taken_out(tensors: dict[str, Tensor], directory: Path | None) -> dict[str, Tensor]:
    """Copies of what this process holds of some tensors: in a file of a directory, where they take no memory; in memory
    without one."""
    if directory is None:
        return {name: local_shard(tensor).to("cpu", copy=True) for name, tensor in tensors.items()}
    make_directory(directory)
    disk = Disk(directory)
    return {name: disk.put(local_shard(tensor)) for name, tensor in tensors.items()}


@torch.no_grad()
def put_back(model: nn.Module, values: dict[str, Tensor]) -> None:
    """Give the `moving_tensors` values, of which each process has what it holds of them."""
    for name, tensor in moving_tensors(model).items():
        local_shard(tensor).copy_(values[name])


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that training on `device` draws from, by kind of device: dropout draws where it runs.

    Those of one process are those of all: they begin with one seed, and draw equally often.
    """
    return {kind: generators.get_rng_state() for kind, generators in _generators(device).items()}


def put_back_random(states: dict[str, Tensor], device: torch.device) -> None:
    """Go on drawing from `random_states`; those of another kind of device than `device` are left alone."""
    for kind, generators in _generators(device).items():
        if kind in states:
            generators.set_rng_state(states[kind])


def _generators(device: torch.device) -> dict[str, Any]:
    """Modules of torch with the generator of the CPU and, if that is another one, of the current `device`."""
    own = {} if device.type == "cpu" else {device.type: torch.get_device_module(device)}
    return {"cpu": torch, **own}


def on_first(value: Any, copied: bool) -> Any:
    """A nested state as the first process writes it: its sharded tensors whole, the copies on the CPU.

    Collective: every process must call it; the others get None for each tensor, and copy none.

    Args:
        value: dicts and lists of tensors and plain values.
        copied: copy the tensors that are whole already, so that training may change them while they are written.
    """
    if isinstance(value, Tensor):
        return gathered(value, copied=copied)
    if isinstance(value, dict):
        return {key: on_first(item, copied) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(on_first(item, copied) for item in value)
    return value


def hash_of_tensors(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors: names, dtypes, shapes and values."""
    with ThreadPoolExecutor() as pool:  # hashing releases the lock of Python
        digests = list(pool.map(hash_of_tensor, tensors.values()))
    lines = (f"{name} {digest}\n" for name, digest in zip(tensors, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hash_of_tensor(*tensors: Tensor) -> str:
    """SHA-256 of a tensor, or of several one after the other: dtypes, shapes and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        release(tensor)
    return digest.hexdigest()


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of a model by name; one that has two names, by the first."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor):
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())


def _moves(tensor: Tensor) -> bool:
    # A step may change a buffer, such as the range of static activations.
    return tensor.requires_grad if isinstance(tensor, nn.Parameter) else True
