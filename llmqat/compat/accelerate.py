"""Private names of accelerate: the state that a process keeps between two accelerators."""

from accelerate.state import AcceleratorState

from llmqat.compat.register import leans_on


@leans_on("accelerate.state.AcceleratorState._reset_state", test="tests/train/test_together.py")
def forget_accelerator() -> None:
    """Let the next accelerator of this process compute in another precision or place than the last one."""
    AcceleratorState._reset_state()
