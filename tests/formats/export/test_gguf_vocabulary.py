"""Tokenizers in GGUF: llama.cpp gives the same tokens, or the tokenizer is refused."""

import copy
import json

import pytest

from llmqat.errors import LlmqatError
from llmqat.formats.export.gguf_vocabulary import add_vocabulary, kinds, scores, words_of
from llmqat.models.gguf_words import LLAMA3, QWEN2, WORDS, begins_with_space


class Writer:
    """Keeps what `gguf.GGUFWriter` is told."""

    def __init__(self):
        self.said = {}

    def __getattr__(self, name):
        return lambda value: self.said.__setitem__(name.removeprefix("add_"), value)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}
CUT_ALREADY = [
    (GPT2, False, "gpt-2"),
    ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, GPT2]}, False, "smollm"),
    *(
        (
            {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False},
                    BYTES,
                ],
            },
            no_merges,
            name,
        )
        for regex, no_merges, name in ((LLAMA3, True, "llama-bpe"), (QWEN2, False, "qwen2"))
    ),
]


@pytest.mark.parametrize(("cutter", "no_merges", "name"), CUT_ALREADY, ids=[name for _, _, name in CUT_ALREADY])
def test_ways_to_cut_text_that_llama_cpp_knows(cutter, no_merges, name, tmp_path):
    tokenizer = {"pre_tokenizer": cutter, "normalizer": None, "model": {"ignore_merges": no_merges}}
    assert words_of(tokenizer, tmp_path) == name
    for change in (
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"model": {"ignore_merges": not no_merges}},
        {"normalizer": {"type": "Lowercase"}},
    ):
        with pytest.raises(LlmqatError, match=r"cuts text otherwise than .* does, into other tokens \(known: gpt-2, "):
            words_of(tokenizer | change, tmp_path)


def test_names_are_those_of_the_table():
    assert [name for _, _, name in CUT_ALREADY] == [name for name, _ in WORDS.values()]


SENTENCEPIECE = {
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace"}]},
    "pre_tokenizer": None,
    "model": {
        "type": "BPE",
        "byte_fallback": True,
        "unk_token": "<unk>",
        "vocab": {"<unk>": 0, "<s>": 1, "<0x41>": 2, "a": 3, "b": 4, "ab": 5, "aab": 6, "\u2581": 7},
        "merges": [["a", "b"], "a ab"],
    },
    "added_tokens": [
        {"id": 0, "content": "<unk>", "special": True},
        {"id": 1, "content": "<s>", "special": True},
        {"id": 8, "content": "\u2581\u2581", "special": False},
    ],
}


def write(directory, tokenizer):
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    writer = Writer()
    add_vocabulary(writer, directory, 10)
    return writer.said


def test_sentencepiece(tmp_path):
    said = write(tmp_path, SENTENCEPIECE)
    assert said["tokenizer_model"] == "llama"
    assert said["add_space_prefix"] is True
    assert said["token_list"] == ["<unk>", "<s>", "<0x41>", "a", "b", "ab", "aab", "\u2581", "  ", "[PAD9]"]
    assert said["token_types"] == [2, 3, 6, 1, 1, 1, 1, 1, 4, 5]
    assert said["bos_token_id"] == 1
    assert said["add_bos_token"] is False
    assert said["token_scores"][5] > said["token_scores"][6] > said["token_scores"][3]


def test_a_space_before_a_text():
    assert begins_with_space({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "first"}})
    assert not begins_with_space({"pre_tokenizer": {"type": "Metaspace", "prepend_scheme": "never"}})
    assert not begins_with_space({"normalizer": {"type": "Replace"}})


def test_the_first_merge_of_a_token_counts():
    assert scores({"ab": 0, "a": 1, "b": 2}, [["a", "b"], ["ab", ""]], 3) == [0.0, -1e6, -1e6]


def test_byte_level_tokens_have_no_byte_kind():
    tokenizer = {"model": {"unk_token": None}, "added_tokens": []}
    assert kinds({"<0x41>": 0}, tokenizer, 1) == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"added_tokens": [{"id": 10, "content": "x", "special": False}]},
            "has tokens up to 10, and the model an",
        ),
        (
            {"model": {"type": "Unigram", "vocab": {}}},
            r"no tokenizer like .*tokenizer\.json, a Unigram model; export",
        ),
        ({"model": None}, r"tokenizer\.json is damaged; copy it again"),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    with pytest.raises(LlmqatError, match=message):
        write(tmp_path, copy.deepcopy(SENTENCEPIECE) | change)


def test_without_a_tokenizer(tmp_path):
    with pytest.raises(LlmqatError, match=r"has no tokenizer\.json, which a GGUF file holds; save it there with Auto"):
        add_vocabulary(Writer(), tmp_path, 10)
