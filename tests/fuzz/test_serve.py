"""Random arguments of forward and generate: what plain transformers makes of them on the same packed weights, or a
refusal in one line, and never the end of the process."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from llmqat.errors import LlmqatError
from llmqat.serve.attach import attach
from llmqat.serve.int8_cache import Int8Cache
from tests.fuzz.children import in_child
from tests.serve.helpers import packed_model

VOCABULARY, TOKENS = 128, 9
IDS = torch.arange(2 * TOKENS).reshape(2, TOKENS) * 37 % VOCABULARY

numbers = st.sampled_from([None, -1, 0, 1, 2, 7, 100, 1.5, float("nan"), float("inf"), True, "3", [1], torch.tensor(2)])


@dataclass(frozen=True)
class Twins:
    """A packed model on the native path, the same one on the code of transformers, and one of other sizes."""

    native: Any
    plain: Any
    other: Any


@pytest.fixture(scope="module", params=["llama", "mistral-int8"])
def twins(request: pytest.FixtureRequest) -> Twins:
    family, _, int8 = request.param.partition("-")
    kv_bits = 8 if int8 else None
    models = [packed_model(family, kv_bits=kv_bits, sliding_window=6 if int8 else None) for _ in range(2)]
    other = packed_model(family, kv_bits=kv_bits, num_hidden_layers=3, num_key_value_heads=4)
    return Twins(attach(models[0]), attach(models[1], native=False), attach(other))


# ---- values ----------------------------------------------------------------------------------------------------------

DTYPES = (torch.int64, torch.int32, torch.uint8, torch.bool, torch.float32, torch.float16, torch.complex64)
SHAPES: dict[str, Any] = {
    "as it is": lambda tensor: tensor,
    "flat": lambda tensor: tensor.reshape(-1),
    "in a batch": lambda tensor: tensor[None],
    "twice": lambda tensor: torch.cat([tensor, tensor]),
    "no rows": lambda tensor: tensor[:0],
    "no tokens": lambda tensor: tensor[:, :0],
    "a token less": lambda tensor: tensor[:, :-1],
    "two tokens more": lambda tensor: torch.cat([tensor, tensor[:, -2:]], 1),
    "four dimensions": lambda tensor: tensor[None, None],
    "a number": lambda tensor: tensor.sum(),
    "strided": lambda tensor: torch.stack([tensor, tensor], -1)[..., 0],
    "on meta": lambda tensor: tensor.to("meta"),
    "sparse": lambda tensor: tensor.to_sparse(),
    "a list": lambda tensor: tensor.tolist(),
}


@st.composite
def of(draw: Any, valid: torch.Tensor, values: tuple[Any, ...]) -> Any:
    """A valid tensor as it is, or with single other values, or of another dtype or shape, or something else."""
    tensor = valid.clone()
    kind = draw(st.sampled_from(["valid", "valid", "values", "dtype", "shape", "object"]))
    if kind == "values" and tensor.numel():
        tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = draw(st.sampled_from(values))
    if kind == "dtype":
        tensor = tensor.to(draw(st.sampled_from(DTYPES)))
    if kind == "shape":
        return SHAPES[draw(st.sampled_from(sorted(SHAPES)))](tensor)
    return draw(st.sampled_from([None, 3, "x", [], torch.ones(())])) if kind == "object" else tensor


CACHES = (
    "none",
    "new",
    "without a config",
    "filled",
    "cropped",
    "of codes",
    "of two",
    "of another",
    "static",
    "a number",
)


def cache_named(name: str, model: Any, other: Any) -> Any:
    """A cache for `model`: each call gets one of its own."""
    new = {"without a config": DynamicCache, "of codes": lambda: Int8Cache(model.config)}.get(
        name, lambda: DynamicCache(config=model.config)
    )
    cache = new()
    if name == "static":
        return StaticCache(config=model.config, max_cache_len=32)
    if name == "of another":
        cache = DynamicCache(config=other.config)
        other(IDS[:1, :4], past_key_values=cache)
    if name in ("filled", "cropped", "of codes", "of two"):
        model(IDS[: 2 if name == "of two" else 1, :4], past_key_values=cache)
    if name == "cropped":
        cache.crop(-2)
    return {"none": None, "a number": 3}.get(name, cache)


@st.composite
def inputs(draw: Any) -> dict[str, Any]:
    """Ids or embeddings, mask and positions, mostly of one length."""
    tokens, past = draw(st.integers(1, TOKENS)), draw(st.sampled_from([0, 4]))
    ids = IDS[: draw(st.sampled_from([1, 1, 1, 2])), :tokens]
    given = {"input_ids": draw(of(ids, (-1, VOCABULARY, 1 << 40, -(1 << 63))))}
    mask = torch.ones(len(ids), past + tokens, dtype=torch.int64)
    if draw(st.booleans()):
        given["attention_mask"] = draw(of(mask, (0, 2, -1)))
    if draw(st.booleans()):
        given["position_ids"] = draw(of(torch.arange(past, past + tokens)[None], (-1, 0, 511, 1 << 40)))
    if draw(st.integers(0, 5)) == 0:
        given["inputs_embeds"] = draw(of(torch.ones(1, tokens, 64) / 7, (float("nan"), float("inf"), 1e30)))
        given.pop(draw(st.sampled_from(["input_ids", "nothing"])), None)
    return given


FLAGS = (
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "logits_to_keep",
    "labels",
    "foo",
    "past",
)
SETTINGS = (
    *("max_new_tokens", "max_length", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "num_beams"),
    *(
        "num_return_sequences",
        "eos_token_id",
        "pad_token_id",
        "repetition_penalty",
        "no_repeat_ngram_size",
        "use_cache",
    ),
    *("return_dict_in_generate", "output_scores", "custom_generate", "prefill_chunk_size", "foo", "past"),
    *("cache_implementation", "stopping_criteria", "logits_processor", "generation_config", "bad_words_ids"),
)


# ---- calls -----------------------------------------------------------------------------------------------------------


def result_of(call: Any, given: dict[str, Any], name: str, keyword: str, model: Any, other: Any) -> Any:
    """What a call returns, as a list of tensors, or the exception."""
    torch.manual_seed(3)
    with torch.no_grad():
        cache = cache_named(name, model, other)
    own = {key: copy.deepcopy(value) for key, value in given.items()} | ({keyword: cache} if cache is not None else {})
    try:
        return call(model, own)
    except Exception as error:
        return error


def forward(model: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    """Logits, and how long the cache is then."""
    output = model(**given)
    logits = output[0] if isinstance(output, tuple) else output.logits
    cache = given.get("past_key_values", given.get("cache"))
    length = cache.get_seq_length() if hasattr(cache, "get_seq_length") else 0
    return [logits, torch.tensor(int(length))]


def generate(model: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    """The tokens."""
    output = model.generate(**given)
    return [output if isinstance(output, torch.Tensor) else output.sequences]


def check(call: Any, twins: Twins, given: dict[str, Any], name: str, keyword: str) -> None:
    """The native path does what transformers does, or refuses in one line."""
    native = result_of(call, given, name, keyword, twins.native, twins.other)
    if isinstance(native, LlmqatError):
        assert "\n" not in str(native)
        assert len(str(native)) < 1000
        return
    plain = result_of(call, given, name, keyword, twins.plain, twins.other)
    if isinstance(native, Exception) or isinstance(plain, Exception):
        assert type(native) is type(plain), (repr(native)[:500], repr(plain)[:500])
        return
    for ours, theirs in zip(native, plain, strict=True):
        assert ours.device == theirs.device
        if not ours.is_meta:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3, equal_nan=True)


caches = st.sampled_from(CACHES)
keywords = st.sampled_from(["past_key_values", "past_key_values", "cache"])
flags = st.dictionaries(st.sampled_from(FLAGS), numbers, max_size=1)
settings = st.dictionaries(st.sampled_from(SETTINGS), numbers, max_size=2)


@given(given=inputs(), flags=flags, cache=caches, keyword=keywords)
def test_forward(twins, given, flags, cache, keyword):
    with torch.no_grad():
        in_child(check, forward, twins, {**given, **flags}, cache, keyword)


@given(given=inputs(), settings=settings, cache=caches, keyword=keywords)
def test_generate(twins, given, settings, cache, keyword):
    given = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": -1, **given, **settings}
    in_child(check, generate, twins, given, cache, keyword)
