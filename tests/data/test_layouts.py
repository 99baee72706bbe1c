import json

import pytest

from llmqat.data.layouts import documents_of, layout_of
from llmqat.data.rows import BadRows
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


def system(content):
    return {"role": "system", "content": content}


TALK = [user("q"), assistant("a")]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("row", "messages", "arguments"),
    [
        ({"messages": TALK, "tools": [TOOL]}, TALK, {"tools": [TOOL]}),
        ({"messages": TALK, "tools": json.dumps([TOOL])}, TALK, {"tools": [TOOL]}),
        ({"messages": TALK, "tools": [json.dumps(TOOL)]}, TALK, {"tools": [TOOL]}),
        ({"messages": TALK, "tools": json.dumps([{"default": None}])}, TALK, {"tools": [{"default": None}]}),
        ({"messages": TALK, "tools": [{**TOOL, "strict": None}]}, TALK, {"tools": [TOOL]}),
        ({"messages": TALK, "tools": [], "documents": None}, TALK, {}),
        ({"messages": TALK, "tools": "", "chat_template_kwargs": ""}, TALK, {}),
        ({"messages": TALK, "functions": [TOOL["function"]]}, TALK, {"tools": [TOOL]}),
        ({"messages": TALK, "chat_template_kwargs": {"effort": "low", "x": None}}, TALK, {"effort": "low"}),
        ({"messages": TALK, "chat_template_kwargs": '{"effort": "low"}'}, TALK, {"effort": "low"}),
        ({"messages": TALK, "documents": [{"text": "d", "title": None}]}, TALK, {"documents": [{"text": "d"}]}),
        ({"messages": TALK, "enable_thinking": False}, TALK, {"enable_thinking": False}),
        ({"messages": TALK, "enable_thinking": "False"}, TALK, {"enable_thinking": False}),
        ({"prompt": "q", "completion": "a", "tools": [TOOL]}, TALK, {"tools": [TOOL]}),
        ({"messages": TALK, "system": "s"}, [system("s"), *TALK], {}),
        ({"messages": TALK, "system": " "}, TALK, {}),
        ({"messages": [system("s"), *TALK], "system": "s"}, [system("s"), *TALK], {}),
        ({"system_prompt": "s", "question": "q", "response": "a"}, [system("s"), *TALK], {}),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, TALK, {}),
        ({"instruction": "q", "output": "a", "history": [["h", "i"]]}, [user("h"), assistant("i"), *TALK], {}),
        ({"query": "q", "response": "a", "history": '[["h", "i"]]'}, [user("h"), assistant("i"), *TALK], {}),
        ({"instruction": "q", "output": "a", "history": [user("h")]}, [user("h"), *TALK], {}),
        ({"instruction": "q", "output": "a", "history": []}, TALK, {}),
        ({"messages": TALK, "images": [], "image": None, "videos": [None]}, TALK, {}),
        (
            {"prompt": [*TALK, user("r")], "completion": [assistant("b")]},
            [user("q"), {**assistant("a"), "weight": 0}, user("r"), assistant("b")],
            {},
        ),
    ],
)
def test_what_stands_beside_a_conversation(row, messages, arguments):
    document = read(row)
    assert document == messages
    assert document.template_arguments == arguments


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": TALK, "tools": "a hammer"}, "tools is not JSON"),
        ({"messages": TALK, "tools": [7]}, "tools is not a list of objects"),
        ({"messages": TALK, "chat_template_kwargs": [1]}, "chat_template_kwargs is list, not an object"),
        ({"messages": TALK, "chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs holds tokenize, which"),
        (
            {"messages": TALK, "tools": [TOOL], "chat_template_kwargs": {"tools": []}},
            "chat_template_kwargs and a column of its own give tools differently",
        ),
        ({"messages": TALK, "enable_thinking": "maybe"}, "enable_thinking is 'maybe', not true or false"),
        ({"messages": TALK, "images": [b"png"]}, "images is not empty, and llmqat learns from text only"),
        ({"prompt": "q", "completion": "a", "image": {"bytes": b"png"}}, "image is not empty"),
        ({"messages": TALK, "system": 7}, "system is int, not text"),
        ({"messages": [system("t"), *TALK], "system": "s"}, "two system messages that differ"),
        ({"messages": TALK, "system": "s", "system_prompt": "t"}, "two system messages that differ"),
        ({"query": "q", "response": "a", "history": [[1, 2]]}, "a turn of history is int, not text"),
        ({"query": "q", "response": "a", "history": "before"}, "history is not JSON"),
        ({"query": "q", "response": "a", "history": ["before"]}, "a message of history is str, not an object"),
        ({"instruction": "q", "output": "a", "input": 7}, "input is int, not text"),
        ({"prompt": [user("q")], "completion": [assistant("a")], "input": "x"}, "input stands beside a prompt of mess"),
        ({"text": "half a \ud83d"}, "text holds half a character"),
        ({"text": "a\0b"}, "text holds a NUL character"),
    ],
)
def test_what_stands_beside_a_conversation_and_cannot_be_used(row, reason):
    assert read(row).startswith(f"row 1: {reason}")


def test_columns_that_nothing_is_read_from_are_counted():
    bad = BadRows()
    rows = [(f"row {i}", {"messages": TALK, "id": i or None, "tags": ["x"], "tools": None, "n": ""}) for i in range(3)]
    rows.append(("row 3", {"messages": TALK, "late": 1, "system": "s"}))
    documents_of(rows, bad, "text", "auto", "set")
    assert bad.unused == {"id": 2, "tags": 3, "late": 1}


def test_a_row_nested_too_deeply_is_left_out():
    value = "x"
    for _ in range(5000):
        value = [value]
    bad = BadRows()
    rows = [("row 1", {"messages": [{**TALK[1], "x": value}]}), ("row 2", {"messages": TALK})]
    assert documents_of(rows, bad, "text", "auto", "set")[1] == [TALK]
    assert bad.first == "row 1: nested too deeply"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None}, "text is missing, not text"),
        ({"text": 7}, "text is int, not text"),
        ({"messages": None}, "messages is missing, not a list of messages"),
        ({"messages": ["q"]}, "a message of messages is str, not an object"),
        ({"messages": [{"role": "boss", "content": "q"}]}, "a message of messages has role 'boss'; known: system, "),
        ({"messages": [user({"image": 1})]}, "the content of a message of messages is dict, not text"),
        ({"messages": [user([{"type": "image"}])]}, "the content of a message of messages has a part of type 'image'"),
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
