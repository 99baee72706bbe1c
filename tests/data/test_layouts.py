import pytest

from llmqat.data.layouts import documents_of, layout_of
from llmqat.data.sources import BadRows
from llmqat.errors import LlmqatError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def read(row, kind="auto"):
    """The document of one row, or why it was left out."""
    bad = BadRows()
    _, documents = documents_of([("row 1", row)], bad, "text", kind, "set")
    return documents[0] if documents else bad.first


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "x"}, "x"),
        ({"messages": [user("q"), assistant("a")]}, [user("q"), assistant("a")]),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [user("q"), assistant("a")],
        ),
        (
            {"conversation": [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r")]},
            [{"role": "system", "content": "s"}, user("q"), assistant("a"), user("r")],
        ),
        ({"prompt": "q", "completion": "a"}, [user("q"), assistant("a")]),
        ({"prompt": "q", "response": "a", "text": "x"}, [user("q"), assistant("a")]),
        ({"prompt": [user("q")], "completion": [assistant("a")]}, [user("q"), assistant("a")]),
        ({"instruction": "i", "input": "", "output": "a"}, [user("i"), assistant("a")]),
        ({"instruction": "i", "input": "n", "output": "a"}, [user("i\n\nn"), assistant("a")]),
        ({"instruction": "i", "context": None, "response": "a"}, [user("i"), assistant("a")]),
        ({"question": "q", "answer": "a"}, [user("q"), assistant("a")]),
        (
            {"system": "s", "instruction": "i", "output": "a"},
            [{"role": "system", "content": "s"}, user("i"), assistant("a")],
        ),
        (  # parts, tool calls, and the empty keys of a Parquet struct
            {
                "messages": [
                    user([{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]),
                    {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None},
                    {"role": "observation", "content": "7"},
                    assistant("a"),
                ]
            },
            [
                user("q!"),
                {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},
                {"role": "tool", "content": "7"},
                assistant("a"),
            ],
        ),
    ],
)
def test_layouts(row, expected):
    assert read(row) == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None}, "text is missing, not text"),
        ({"text": 7}, "text is int, not text"),
        ({"messages": None}, "messages is missing, not a list of messages"),
        ({"messages": ["q"]}, "a message of messages is str, not an object"),
        ({"messages": [{"role": "boss", "content": "q"}]}, "a message of messages has role 'boss'; known: system, "),
        ({"messages": [user({"image": 1})]}, "the content of a message of messages is dict, not text"),
        ({"messages": [user([{"type": "image"}])]}, "the content of a message of messages is list, not text"),
        ({"messages": [user(None)]}, "the content of a message of messages is missing, not text"),
        ({"messages": []}, "no message of the assistant"),
        ({"messages": [user("q")]}, "no message of the assistant"),
        ({"messages": [user("q"), assistant(" \n")]}, "the answer is empty"),
        ({"prompt": "q", "completion": ""}, "the answer is empty"),
        ({"prompt": " ", "completion": "a"}, "prompt is empty"),
        ({"prompt": "q", "completion": 7}, "completion is int, not text"),
        ({"prompt": [user("q")], "completion": "a"}, "completion is str, not a list of messages"),
    ],
)
def test_rows_that_cannot_be_used(row, reason):
    assert read(row).startswith(f"row 1: {reason}")


def test_columns_are_those_of_the_first_rows(capsys):
    rows = [("row 1", {"n": 1}), ("row 2", {"text": "x"})]
    bad = BadRows()
    layout, documents = documents_of(rows, bad, "text", "auto", "set")
    assert (layout.columns, documents, bad.first) == (("text",), ["x"], "row 1: text is missing, not text")
    assert documents_of([], bad, "text", "auto", "set") == (None, [])
    bad.report("set", 1)
    assert capsys.readouterr().err == "set: 1 of 2 rows left out; the first one, row 1: text is missing, not text\n"


def test_missing_columns():
    with pytest.raises(LlmqatError, match="set has no column 'body'; choose one of text, n by --text-field"):
        layout_of(["text", "n"], "body", "text", "set")
    with pytest.raises(
        LlmqatError, match=r"set has no conversations: its columns are n; llmqat knows messages, .*, pro"
    ):
        layout_of(["n"], "text", "chat", "set")
