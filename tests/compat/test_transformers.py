import torch

from llmqat.compat.transformers import captures_outputs


def test_hooks_that_transformers_leaves_are_known(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model(torch.arange(4)[None], output_hidden_states=True)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks
    assert all(map(captures_outputs, hooks))
    assert not captures_outputs(print)
