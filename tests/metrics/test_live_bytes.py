import torch
from torch import nn

from llmqat.compat.torch import fake_tensors
from llmqat.metrics.live_bytes import LiveBytes


def test_a_storage_counts_once_and_as_long_as_it_lives():
    x = torch.ones(256)
    live = LiveBytes([x, x[:10]])
    assert live.current == 1024
    with live.counting():
        y = x + 1
        view = y.view(16, 16)
        del y
        assert live.current == 2048
        del view
        z = x[:64] * 2
    assert live.current == 1024 + z.nbytes
    assert live.peak == 2048


def test_products_and_their_backward_are_counted():
    layer = nn.Linear(32, 8, bias=False)
    with LiveBytes().counting() as live:
        layer(torch.ones(4, 32, requires_grad=True)).sum().backward()
    assert live.flops == 3 * 2 * 4 * 32 * 8


def test_fake_tensors_count_like_real_ones():
    def work():
        with LiveBytes().counting() as live:
            x = torch.ones(128, 64, requires_grad=True)
            (torch.softmax(x @ x.T, -1) ** 2).sum().backward()
        return live.peak, live.flops

    real = work()
    with fake_tensors():
        assert work() == real
