"""Let finished parts of a block return what is known of them, in place of computing it in every pass over the data.

A part is a submodule that returns the output of one of its layers, such as attention (its o_proj) or the MLP (its
down_proj). The pass that collects the Hessian of that layer sees its inputs; once it is quantized, they are all that
the output of the whole part depends on. So attention runs once per batch, and each product is made once.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from llmqat.compat.torch import writes_to
from llmqat.nn.fake_quant_linear import FakeQuantLinear


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run `forward` in place of the forward of `module`, until the ``with`` ends.

    No hook can do that: it sees a call, and cannot leave out a module whose weights are not in memory.
    """
    before = vars(module).get("forward")  # of libraries that wrap a module, such as accelerate
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


class Part(NamedTuple):
    """A submodule of a block that returns the output of one of its layers; maybe the layer itself.

    Attributes:
        path: in the block.
        layer: path of that layer in the block.
        width: of the tuple that the submodule returns, nothing but None behind the output; None where it returns the
            output alone.
    """

    path: str
    layer: str
    width: int | None

    def holds(self, name: str) -> bool:
        """Whether the submodule, or layer, `name` is inside the part."""
        return f"{name}.".startswith(f"{self.path}.")

    def returns(self, output: Tensor) -> Any:
        """The return value of the submodule."""
        return output if self.width is None else (output, *[None] * (self.width - 1))


@contextmanager
def finding_parts(block: nn.Module) -> Iterator[list[Part]]:
    """List the parts of `block`, none inside another, when one batch has run through it inside the ``with``.

    Submodules that run more than once are no parts, nor are those that return other tensors beside the output.
    """
    found: list[Part] = []
    outputs: dict[int, tuple[str, Tensor]] = {}
    candidates: dict[str, Part] = {}
    calls: dict[str, int] = {}

    def record(path: str, module: nn.Module, _: object, returned: Any) -> None:
        calls[path] = calls.get(path, 0) + 1
        output, *others = returned if isinstance(returned, tuple) else (returned,)
        if isinstance(module, FakeQuantLinear):
            outputs[id(output)] = path, output
        layer = outputs[id(output)][0] if id(output) in outputs else ""
        part = Part(path, layer, len(returned) if isinstance(returned, tuple) else None)
        if layer and part.holds(layer) and all(other is None for other in others):
            candidates[path] = part

    with ExitStack() as stack:
        for path, module in block.named_modules():
            if path:
                stack.callback(module.register_forward_hook(partial(record, path)).remove)
        yield found
    once = [part for part in candidates.values() if calls[part.path] == calls[part.layer] == 1]
    found += [part for part in once if not any(other.holds(part.path) for other in once if other is not part)]


class _Kept(NamedTuple):
    """The input of a part's layer, or its output, and how often it had been written when it was kept."""

    tensor: Tensor
    is_output: bool
    version: int


class StandIns:
    """Inputs and outputs of the finished parts of one block, by batch.

    Args:
        block: whose parts they are.
        parts: see `finding_parts`.
        passes: names of layers, those that read one tensor together, by the pass that sees it; see
            `llmqat.algorithms.blocks.passes_of`.
        limit: how many bytes may be kept; what lies beyond is computed in each pass that needs it.
    """

    def __init__(self, block: nn.Module, parts: list[Part], passes: list[list[list[str]]], limit: int) -> None:
        self.block, self.limit, self.bytes = block, limit, 0
        self.kept: dict[tuple[Part, int], _Kept] = {}
        self.ending: dict[str, list[Part]] = {}
        waiting = {name for stages in passes for names in stages for name in names}
        for names in (names for stages in passes for names in stages):
            waiting -= set(names)
            done = [part for part in parts if part.layer in names and not any(part.holds(name) for name in waiting)]
            self.ending[names[0]] = done

    def keep(self, first: str, batch: int, x: Tensor) -> None:
        """Keep `x`, what the layers of a stage read (`first` is its first layer), for the parts that end with it."""
        for part in self.ending.get(first, ()):
            self._put(part, batch, x, is_output=False)

    def _put(self, part: Part, batch: int, tensor: Tensor, is_output: bool) -> None:
        before = self.kept.pop((part, batch), None)
        self.bytes += _storage_bytes(tensor) - (0 if before is None else _storage_bytes(before.tensor))
        if self.bytes <= self.limit:
            self.kept[part, batch] = _Kept(tensor, is_output, writes_to(tensor))
        else:
            self.bytes -= _storage_bytes(tensor)

    def forget(self, batch: int) -> None:
        """Let go of what is kept of a batch."""
        for part, of_batch in list(self.kept):
            if of_batch == batch:
                self.bytes -= _storage_bytes(self.kept.pop((part, batch)).tensor)

    @contextmanager
    def standing_in(self, batch: int) -> Iterator[None]:
        """Let the parts of which something is kept of this batch return it, until the ``with`` ends."""
        with ExitStack() as stack:
            for part, of_batch in list(self.kept):
                if of_batch == batch:
                    module, layer = self.block.get_submodule(part.path), self.block.get_submodule(part.layer)
                    stack.enter_context(replaced_forward(module, self._stand_in(part, batch, module, layer)))
            yield

    def _stand_in(self, part: Part, batch: int, module: nn.Module, layer: nn.Module) -> Callable[..., Any]:
        run_layer, run_part = layer.forward, module.forward  # before the stand-in takes their place

        def forward(*args: Any, **kwargs: Any) -> Any:
            tensor, is_output, version = self.kept[part, batch]
            if writes_to(tensor) != version:  # a block that adds to a tensor in place
                return run_part(*args, **kwargs)
            if not is_output:
                tensor = run_layer(tensor)
                self._put(part, batch, tensor, is_output=True)
            return part.returns(tensor)

        return forward


def _storage_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor keeps alive, those of what it is a view of included."""
    return tensor.untyped_storage().nbytes()
