"""Products that mean float32, where a user has allowed narrower ones."""

import pytest
import torch

from llmqat.quant.full_float32 import full_float32
from llmqat.quant.grid import Adapters, Latent
from tests.narrow_products import narrow_products

PRODUCTS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@pytest.fixture(autouse=True)
def _put_back():
    yield
    torch.set_float32_matmul_precision("highest")
    for place in (torch.backends, *PRODUCTS):
        place.fp32_precision = "none"


def settings() -> list[str]:
    return [product.fp32_precision for product in PRODUCTS]


@pytest.mark.parametrize("chosen", ["high", "medium"])
def test_what_was_chosen_is_chosen_again(chosen):
    torch.set_float32_matmul_precision(chosen)
    before = settings()
    with full_float32():
        assert torch.get_float32_matmul_precision() == "highest"
        assert settings() == ["ieee", "ieee"]
        with full_float32():
            pass
        assert settings() == ["ieee", "ieee"]
    assert torch.get_float32_matmul_precision() == chosen
    assert settings() == before
    with pytest.raises(ZeroDivisionError), full_float32():
        raise ZeroDivisionError
    assert settings() == before


def test_the_other_way_of_choosing_counts_too():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    with full_float32():
        assert settings() == ["ieee", "ieee"]
    assert settings() == ["tf32", "none"]


def test_what_was_chosen_for_all_may_be_chosen_anew():
    torch.backends.fp32_precision = "tf32"
    with full_float32():
        assert settings() == ["ieee", "ieee"]
    assert settings() == ["tf32", "tf32"]
    torch.backends.fp32_precision = "ieee"
    assert settings() == ["ieee", "ieee"]


def test_nothing_is_set_where_nothing_narrower_was_allowed():
    with full_float32():
        assert settings() == ["none", "none"]


def test_latents_are_those_of_float32():
    x = torch.randn(20, 32)
    latent = Latent(torch.randn(20, 64), None, Adapters(torch.randn(32, 64), torch.randn(20, 32), 0.5))
    expected = latent.rows(slice(None))
    with narrow_products():
        assert not torch.equal(x @ torch.eye(32), x)
        assert torch.equal(latent.rows(slice(None)), expected)
