"""Data files and rows, random and damaged: each ends in a corpus or in an `LlmqatError`, and no text is made up."""

import copy
import csv
import io
import json
import tempfile
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llmqat.data.chat import IGNORED
from llmqat.data.corpus import load_corpus
from llmqat.data.folders import METADATA
from llmqat.data.layouts import ARGUMENT_COLUMNS, MEDIA_COLUMNS, PAIR_COLUMNS, SYSTEM_COLUMNS, TOOL_COLUMNS
from llmqat.data.messages import MESSAGE_KEYS, ROLES, WEIGHT_KEYS, Conversation
from llmqat.data.sources import CHAT_COLUMNS
from llmqat.data.splits import hold_out
from llmqat.data.text_files import BYTE_ORDER_MARKS, read_text
from llmqat.data.tokens import encode, sequences
from llmqat.errors import LlmqatError
from tests.fuzz.conftest import time_limit

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
roles = st.sampled_from([*ROLES, "function_call", "nobody"])
contents = st.text(max_size=40) | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": st.text()}), max_size=3
)
message_keys = st.sampled_from([*WEIGHT_KEYS, "tool_calls", "function_call", "name", "reasoning_content"])


@st.composite
def messages(draw):
    """A message of a known form, now and then with something wrong or something beside."""
    role, content = draw(st.sampled_from(MESSAGE_KEYS))
    message = {role: draw(roles | anything), content: draw(contents | anything)}
    beside = st.sampled_from([0, 1, True, False, None]) | anything
    return {**message, **draw(st.dictionaries(message_keys, beside, max_size=2))}


talks = st.lists(messages(), max_size=5) | anything
columns_beside = st.sampled_from([*SYSTEM_COLUMNS, *TOOL_COLUMNS, *ARGUMENT_COLUMNS, *MEDIA_COLUMNS, "history", "id"])


@st.composite
def chat_rows(draw):
    """A row with the columns of a conversation, and others beside them."""
    if draw(st.booleans()):
        row = {draw(st.sampled_from(CHAT_COLUMNS)): draw(talks)}
    else:
        row = {column: draw(st.text(max_size=40) | talks) for column in draw(st.sampled_from(PAIR_COLUMNS))}
    kwargs = st.dictionaries(st.sampled_from(["chat_template_kwargs"]), anything, max_size=1)
    return {**row, **draw(st.dictionaries(columns_beside, anything | talks, max_size=2)), **draw(kwargs)}


@st.composite
def damaged(draw, content):
    """Bytes with some of them changed, taken out, put in or repeated, or the end cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        part = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\0", b'"', b"\n", b"[" * 3000, b"\xff\xfe"]))
        end = at + draw(st.integers(0, len(part)))
        kind = draw(st.sampled_from(["replace", "remove", "repeat", "cut"]))
        data[at:end] = {"replace": part, "remove": b"", "repeat": bytes(data[at:end] * 3), "cut": b""}[kind]
        if kind == "cut":
            del data[at:]
    return bytes(data)


def written(suffix, rows):
    """The bytes of a file of that kind which holds the rows."""
    if suffix == ".txt":
        return "\n".join(str(row) for row in rows).encode("utf-8", "replace")
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".csv":
        file = io.StringIO()
        table = csv.DictWriter(file, ["text", "n"], extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)
        return file.getvalue().encode("utf-8", "replace")
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return file.getvalue()


@pytest.fixture(scope="module", autouse=True)
def _quiet(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def chatty(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


def attempt(function, *args):
    """What a function returns, or None where it refuses, in one line."""
    with time_limit():
        try:
            return function(*args)
        except LlmqatError as error:
            refusal = str(error)
    assert refusal
    assert "\n" not in refusal


def corpus_of(content, suffix, rows="auto"):
    """The corpus of a file with that content, or None where it is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a{suffix}")
        path.write_bytes(content)
        return attempt(load_corpus, str(path), "text", rows)


def documents(corpus):
    return [*corpus.train, *corpus.validation, *corpus.test]


def check_training(tokenizer, corpus):
    """Conversations become sequences whose labels are ids of the same place, or are refused."""
    result = attempt(sequences, tokenizer, corpus.train, 96)
    if result is not None and corpus.is_chat:
        learned = result[:, 1] != IGNORED
        assert learned.any(1).all()
        assert (result[:, 0][learned] == result[:, 1][learned]).all()


@given(st.lists(st.fixed_dictionaries({"text": st.text(max_size=60) | anything, "n": anything}), max_size=60))
@example([{"text": "a\0b", "n": 1}] * 3)
@example([{"text": "\ud800", "n": 1}, *({"text": f"{i} ", "n": 10**4000} for i in range(50))])
def test_texts_are_those_of_the_rows(rows):
    """What is read of JSON lines is, in order, the text of each row that has one."""
    corpus = corpus_of(written(".jsonl", rows), ".jsonl")
    texts = [row["text"] for row in rows if isinstance(row["text"], str) and "\0" not in row["text"]]
    texts = [text for text in texts if text.isprintable() or text.encode("utf-8", "ignore").decode() == text]
    if corpus is not None:
        assert "".join(documents(corpus)) == "".join(texts)
        assert 2 * len(texts) >= len(rows)


@given(st.data())
def test_damaged_files_of_texts(tokenizer, data):
    suffix = data.draw(st.sampled_from(SUFFIXES))
    rows = [{"text": f"row {i}: größe", "n": i} for i in range(50)]
    corpus = corpus_of(data.draw(damaged(written(suffix, rows))), suffix)
    if corpus is not None:
        assert all(isinstance(document, str) and "\0" not in document for document in documents(corpus))
        assert all(document.encode() for document in documents(corpus) if document)
        encode(tokenizer, corpus.train)


@given(st.data())
def test_damaged_files_of_conversations(chatty, data):
    suffix = data.draw(st.sampled_from([".jsonl", ".json", ".parquet"]))
    message = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "größe", "weight": 1}]
    corpus = corpus_of(data.draw(damaged(written(suffix, [{"messages": message}] * 20))), suffix)
    if corpus is not None:
        check_training(chatty, corpus)


@given(st.binary(max_size=300), st.sampled_from(SUFFIXES))
def test_random_bytes(content, suffix):
    corpus_of(content, suffix)


@given(st.binary(max_size=80), st.sampled_from([b"", b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf", b"\xff\xfe\0\0"]))
def test_a_text_is_what_its_encoding_says(content, mark):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.txt")
        path.write_bytes(mark + content)
        text = attempt(read_text, path)
    if text is not None:
        stored = mark + content
        encoding = next((name for start, name in BYTE_ORDER_MARKS.items() if stored.startswith(start)), "utf-8")
        assert text == stored.decode(encoding).replace("\r\n", "\n").replace("\r", "\n")
        assert "\0" not in text


@given(st.lists(chat_rows() | anything, max_size=8), st.sampled_from([".jsonl", ".json"]))
def test_rows_of_conversations(chatty, rows, suffix):
    corpus = corpus_of(written(suffix, rows), suffix)
    if corpus is None or not corpus.is_chat:
        return
    for conversation in documents(corpus):
        assert isinstance(conversation, Conversation)
        assert all(isinstance(message["content"], str) for message in conversation)
        assert all(None not in message.values() for message in conversation)
        assert any(message["role"] == "assistant" and message.get("weight", 1) for message in conversation)
    check_training(chatty, corpus)


@given(st.lists(chat_rows(), min_size=1, max_size=8))
def test_rows_of_conversations_in_parquet(chatty, rows):
    try:
        content = written(".parquet", rows)
    except (pyarrow.ArrowException, OverflowError, UnicodeError, TypeError):  # Arrow has no table of such rows
        return
    corpus = corpus_of(content, ".parquet")
    if corpus is not None and corpus.is_chat:
        check_training(chatty, corpus)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=200), max_size=60))
def test_held_out_texts_are_cut_off_the_end(texts):
    corpus = hold_out(list(texts))
    assert "".join(documents(corpus)) == "".join(texts)
    if sum(map(len, texts)) > 2:
        assert all("".join(part) for part in (corpus.train, corpus.validation, corpus.test))


names = st.sampled_from([*(name.replace("*", "x") for name in METADATA), "a.txt", "b.jsonl", "test/c.csv", ".d.txt"])


@given(st.dictionaries(names, st.binary(max_size=20) | st.just(b'{"text": "a b c"}\n' * 3), max_size=5))
def test_directories(files):
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).parent.mkdir(exist_ok=True)
            Path(folder, name).write_bytes(content)
        corpus = attempt(load_corpus, folder)
    assert corpus is None or "".join(corpus.train).strip()
