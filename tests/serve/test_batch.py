"""Several prompts in one call of `generate`: the tokens of transformers' loop on padded rows, without the padding."""

import pytest
import torch
from transformers import DynamicCache

from llmqat.kernels.decoder import NativeDecoder
from llmqat.scheme import QuantScheme
from llmqat.serve.families import FAMILIES
from llmqat.serve.generate import accelerate_generate
from tests.serve.helpers import OPTIONS, generate, native_blocks, rope_options

LENGTHS = 9, 4, 1
PROMPTS = torch.randint(4, 128, (3, 9), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(9) >= 9 - torch.tensor(LENGTHS)[:, None]).long()


@pytest.fixture
def together(monkeypatch):
    """How many sequences each native step took."""
    seen, plain = [], NativeDecoder.together

    def counted(self, hidden, *args):
        seen.append(len(hidden))
        return plain(self, hidden, *args)

    monkeypatch.setattr(NativeDecoder, "together", counted)
    return seen


def both(model, prompts=PROMPTS, mask=MASK, **options):
    """Tokens by the loop of transformers, then by the native one."""
    options = {"attention_mask": mask, "pad_token_id": 3} | options
    expected = generate(model, prompts, **options)
    accelerate_generate(model)
    return expected, generate(model, prompts, **options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_tokens_of_transformers(options, together):
    expected, tokens = both(native_blocks(), **options)
    assert torch.equal(tokens, expected)
    assert together[0] == 3


@pytest.mark.parametrize("family", [name for name, row in FAMILIES.items() if not row.mixer])
@pytest.mark.usefixtures("small_buffers")
def test_families_over_grown_buffers(family, together):
    expected, tokens = both(native_blocks(family, scheme=QuantScheme(4, 32, act_bits=8)), max_new_tokens=30)
    assert torch.equal(tokens, expected)
    assert together == [3] * 29


def test_an_int8_cache(together):
    expected, tokens = both(native_blocks(kv_bits=8), max_new_tokens=30)
    assert torch.equal(tokens, expected)
    assert together == [3] * 29


def test_a_sequence_that_has_ended_is_padded_and_not_computed(together):
    model = native_blocks()
    free = generate(model, PROMPTS, attention_mask=MASK, pad_token_id=3)
    first = int(free[1, 9 + 5])
    expected, tokens = both(model, eos_token_id=first)
    assert torch.equal(tokens, expected)
    assert (tokens == 3).any()
    assert together[0] == 3
    assert together[-1] < 3


def test_more_than_one_answer_to_a_prompt(together):
    expected, tokens = both(native_blocks(), PROMPTS[:1], None, do_sample=True, num_return_sequences=4)
    assert torch.equal(tokens, expected)
    assert tokens.shape == (4, 29)
    assert together == [4] * 19


@pytest.mark.parametrize(
    "case",
    [
        {"mask": MASK.flip(1)},
        {"past_key_values": DynamicCache()},
        {"rope": "dynamic"},
    ],
    ids=["padding on the right", "a cache of one's own", "a rotary embedding by length"],
)
def test_what_stays_with_transformers(case, together):
    case = {"mask": MASK, "family": "llama", "rope": "default"} | case
    model = native_blocks(case.pop("family"), **rope_options(case.pop("rope")))
    accelerate_generate(model)
    tokens = generate(model, PROMPTS, attention_mask=case.pop("mask"), pad_token_id=3, max_new_tokens=3, **case)
    assert tokens.shape == (3, 12)
    assert together == []


def test_blocks_without_attention_stay_with_transformers(together):
    model = native_blocks("qwen3_5_text")
    accelerate_generate(model)
    assert generate(model, PROMPTS, attention_mask=MASK, pad_token_id=3, max_new_tokens=3).shape == (3, 12)
    assert together == []
