import pytest
import torch

from llmqat.config import OBSERVERS
from llmqat.errors import LlmqatError
from llmqat.quant.affine import fake_quantize_static
from llmqat.quant.observers import BINS, MOMENTUM, initial_state, observe, observed_range


def range_after(kind, *batches):
    state = initial_state(kind)
    for batch in batches:
        state = observe(kind, state, batch)
    return observed_range(kind, state)


@pytest.fixture
def batches():
    """Growing in size and in range, so that a histogram has to double its upper end."""
    return [scale * torch.randn(4, 50, 3) for scale in (0.01, 1.0, 30.0)]


@pytest.mark.parametrize("kind", OBSERVERS)
def test_nothing_seen_and_zeros(kind):
    assert observed_range(kind, initial_state(kind)) == 0
    x = torch.randn(1000)
    assert range_after(kind, torch.zeros(5), x) > 0
    assert range_after(kind, torch.zeros(5)).isfinite()
    assert range_after(kind, x, torch.zeros(0, 3)) == range_after(kind, x)


def test_minmax_is_the_largest_magnitude(batches):
    assert range_after("minmax", *batches) == torch.cat([b.flatten() for b in batches]).abs().max()
    assert range_after("minmax", torch.tensor([1.0, -7.0])) == 7


def test_moving_average_starts_with_the_first_batch(batches):
    expected = batches[0].abs().max().double()
    assert range_after("moving_average", batches[0]) == expected
    for batch in batches[1:]:
        expected = MOMENTUM * expected + (1 - MOMENTUM) * batch.abs().max().double()
    torch.testing.assert_close(range_after("moving_average", *batches), expected)


def test_percentile_leaves_the_outliers_out():
    x = torch.rand(200_000)
    x[:10] = 1000.0  # fewer than 1 in 10,000
    kept = range_after("percentile", x)
    assert 1.0 - 1e-6 <= kept <= 1.0 + 1024 / BINS, "within a bin of the values that are not outliers"
    x[:40] = 1000.0
    assert range_after("percentile", x) > 990


def test_mse_range_has_about_the_least_error():
    x = torch.randn(50_000) * torch.rand(50_000) ** 4 * 10
    x[:3] = torch.tensor([60.0, -80.0, 55.0])
    found = range_after("mse", *x.split(10_000))

    def error(magnitude):
        return float((fake_quantize_static(x, torch.tensor([magnitude / 127])) - x).square().mean())

    best = min(error(magnitude) for magnitude in torch.linspace(1, 80, 300).tolist())
    assert error(float(found)) <= 1.05 * best
    assert error(float(found)) < 0.9 * error(float(x.abs().max()))


@pytest.mark.parametrize("kind", ["percentile", "mse"])
def test_a_histogram_is_the_same_however_the_data_is_cut(kind, batches):
    x = torch.cat([batch.flatten() for batch in batches])
    in_parts = initial_state(kind)
    for batch in batches:
        in_parts = observe(kind, in_parts, batch)
    at_once = observe(kind, initial_state(kind), x)
    assert in_parts[0] == at_once[0] == 2.0 ** torch.ceil(torch.log2(x.abs().max()))
    assert in_parts[1:].sum() == at_once[1:].sum() == len(x)
    assert torch.equal(in_parts, at_once), "bins merge exactly"


def test_unknown_observer():
    with pytest.raises(LlmqatError, match="no observer 'max'; choose one of minmax, moving_average, percentile, mse"):
        initial_state("max")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", OBSERVERS)
def test_inputs_that_are_not_finite_are_refused(kind, value):
    with pytest.raises(LlmqatError, match="inputs of a layer with static activations hold NaN or infinity; check"):
        observe(kind, initial_state(kind), torch.tensor([1.0, value]))
