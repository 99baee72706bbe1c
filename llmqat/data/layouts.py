"""The meaning of a row: a text, or a conversation. The known names of columns are tables."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

from llmqat.data.messages import (
    Conversation,
    Document,
    checked,
    checked_text,
    from_json,
    kind_of,
    messages_of,
    without_none,
)
from llmqat.data.rows import BadRow, BadRows, Row
from llmqat.data.sources import CHAT_COLUMNS
from llmqat.errors import LlmqatError

PAIR_COLUMNS = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
)
# Columns that add to the question of a pair.
INPUT_COLUMNS = ("input", "context")
# Columns that open a conversation: what sets the scene, and turns before the question of a pair.
SYSTEM_COLUMNS = ("system", "system_prompt")
HISTORY_COLUMN = "history"
# Columns that a chat template gets: as they are, and as an object of any of its arguments.
TOOL_COLUMNS = ("tools", "functions")
ARGUMENT_COLUMNS = ("documents", "enable_thinking")
ARGUMENTS_COLUMN = "chat_template_kwargs"
# Columns of what is no text: a row that holds any cannot be learned from its text alone.
MEDIA_COLUMNS = ("image", "images", "audio", "audios", "video", "videos")
# Arguments of `apply_chat_template` that are llmqat's to set.
OWN_ARGUMENTS = (
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tokenize"),
    *("sanitize_control_tokens", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
)
# Read of every conversation, also where the first rows lack them.
BESIDE_COLUMNS = (*SYSTEM_COLUMNS, *TOOL_COLUMNS, *ARGUMENT_COLUMNS, ARGUMENTS_COLUMN)
ROWS_TO_DECIDE = 100


@dataclass(frozen=True)
class Layout:
    """How rows are read.

    Attributes:
        columns: what they are read from; shown to the user.
        read: a row to a document; raises `BadRow`.
        chat: whether documents are conversations.
    """

    columns: tuple[str, ...]
    read: Callable[[dict[str, Any]], Document]
    chat: bool


def layout_of(columns: Iterable[str], text_field: str, kind: str, name: str) -> Layout:
    """The layout of rows with these columns: by `kind`, or conversations where they look like one, else text.

    Raises:
        LlmqatError: if they have no column that `kind` needs.
    """
    columns = list(columns)
    chat = _chat_layout(columns) if kind != "text" else None
    if chat is not None:
        return chat
    if kind == "chat":
        known = ", ".join([*CHAT_COLUMNS, *map("+".join, PAIR_COLUMNS)])
        raise LlmqatError(f"{name} has no conversations: its columns are {', '.join(columns)}; llmqat knows {known}")
    if text_field not in columns:
        raise LlmqatError(f"{name} has no column {text_field!r}; choose one of {', '.join(columns)} by --text-field")
    return Layout((text_field,), partial(_text, column=text_field), False)


def _chat_layout(columns: list[str]) -> Layout | None:
    """The first layout of conversations that the columns have."""
    for column in CHAT_COLUMNS:
        if column in columns:
            return _conversations([column, *BESIDE_COLUMNS], columns, partial(messages_of, column=column), column)
    for prompt, answer in PAIR_COLUMNS:
        if {prompt, answer} <= set(columns):
            used = [HISTORY_COLUMN, prompt, *INPUT_COLUMNS, answer, *BESIDE_COLUMNS]
            return _conversations(used, columns, partial(_pair, prompt=prompt, answer=answer), None)
    return None


def _conversations(
    known: list[str], columns: list[str], messages: Callable[[Any], list[dict[str, Any]]], column: str | None
) -> Layout:
    """A layout of conversations: their messages come from one column, or (None) from the whole row."""

    def read(row: dict[str, Any]) -> Conversation:
        _refuse_media(row)
        found = messages(row.get(column) if column else row)
        return checked(Conversation([*_system(row, found), *found], template_arguments(row)))

    return Layout(tuple(name for name in known if name in columns), read, True)


def _text(row: dict[str, Any], column: str) -> str:
    return checked_text(row.get(column), column)


def _refuse_media(row: dict[str, Any]) -> None:
    held = next((column for column in MEDIA_COLUMNS if _holds(row.get(column))), None)
    if held is not None:
        raise BadRow(f"{held} is not empty, and llmqat learns from text only")


def _holds(value: Any) -> bool:
    """Whether there is anything in a value: not None, nor an empty text or list, nor a list of these."""
    if isinstance(value, list | tuple):
        return any(map(_holds, value))
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def _pair(row: dict[str, Any], prompt: str, answer: str) -> list[dict[str, Any]]:
    """A question, what it is about, and the answer; prompt and completion may be lists of messages, too.

    Answers in a prompt that is a list of messages are not learned, as in other tools: the completion is.
    """
    history = _history(row.get(HISTORY_COLUMN))
    if isinstance(row.get(prompt), list) or isinstance(row.get(answer), list):
        extra = next((column for column in INPUT_COLUMNS if _holds(row.get(column))), None)
        if extra is not None:
            raise BadRow(f"{extra} stands beside a {prompt} of messages")
        shown = messages_of(row.get(prompt), prompt)
        shown = [{**message, "weight": 0} if message["role"] == "assistant" else message for message in shown]
        return [*history, *shown, *messages_of(row.get(answer), answer)]
    parts = [checked_text(row.get(prompt), prompt)]
    parts += [checked_text(row[column], column) for column in INPUT_COLUMNS if row.get(column) is not None]
    question = "\n\n".join(part for part in parts if part.strip())
    if not question:
        raise BadRow(f"{prompt} is empty")
    turn = {"role": "user", "content": question}
    return [*history, turn, {"role": "assistant", "content": checked_text(row.get(answer), answer)}]


def _history(value: Any) -> list[dict[str, Any]]:
    """Turns before the question: pairs of question and answer, or messages; those may be JSON text."""
    turns = from_json(value, HISTORY_COLUMN)
    if not turns:
        return []
    if isinstance(turns, list) and all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in turns):
        roles = ("user", "assistant")
        return [
            {"role": role, "content": checked_text(said, f"a turn of {HISTORY_COLUMN}")}
            for turn in turns
            for role, said in zip(roles, turn, strict=True)
        ]
    return messages_of(turns, HISTORY_COLUMN)


def _system(row: dict[str, Any], messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The message that a system column opens a conversation with, unless the conversation opens with the same."""
    opening = []
    for column in SYSTEM_COLUMNS:
        value = row.get(column)
        if value is None or (isinstance(value, str) and not value.strip()):
            continue
        opening.append({"role": "system", "content": checked_text(value, column)})
    given = [message for message in messages[:1] if message["role"] == "system"]
    distinct = {message["content"] for message in (*opening, *given)}
    if len(distinct) > 1:
        raise BadRow("two system messages that differ, of a column and another column or message")
    return [] if given else opening[:1]


def template_arguments(row: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template beside the messages of a row.

    Raises:
        BadRow: if a column holds what no template takes.
    """
    given = without_none(from_json(row.get(ARGUMENTS_COLUMN), ARGUMENTS_COLUMN)) or {}
    arguments = {column: without_none(row[column]) for column in ARGUMENT_COLUMNS if _holds(row.get(column))}
    if not isinstance(given, dict):
        raise BadRow(f"{ARGUMENTS_COLUMN} is {kind_of(given)}, not an object")
    own = next((name for name in given if name in OWN_ARGUMENTS), None)
    if own is not None:
        raise BadRow(f"{ARGUMENTS_COLUMN} holds {own}, which llmqat sets itself")
    if isinstance(arguments.get("enable_thinking"), str):  # of a table
        arguments["enable_thinking"] = _flag(arguments["enable_thinking"])
    tools = [tool for column in TOOL_COLUMNS for tool in _tools(row.get(column), column)]
    arguments = {**arguments, **({"tools": tools} if tools else {})}
    clash = next((name for name in given if name in arguments and given[name] != arguments[name]), None)
    if clash is not None:
        raise BadRow(f"{ARGUMENTS_COLUMN} and a column of its own give {clash} differently")
    return {**arguments, **given}


def _flag(text: str) -> bool:
    flags = {"true": True, "1": True, "false": False, "0": False}
    if text.strip().lower() not in flags:
        raise BadRow(f"enable_thinking is {text!r}, not true or false")
    return flags[text.strip().lower()]


def _tools(value: Any, column: str) -> list[dict[str, Any]]:
    """Tools of a column; a function, OpenAI's first form, is put into a tool."""
    tools = _objects(value, column)
    if column == "functions":
        return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return tools


def _objects(value: Any, column: str) -> list[dict[str, Any]]:
    """A list of objects, which tables hold as JSON text, all together or each."""
    items = from_json(value, column) if isinstance(value, str) else without_none(value)  # a null in JSON text is meant
    items = items if isinstance(items, list) else [] if items is None else [items]
    objects = [from_json(item, f"an item of {column}") for item in items]
    if not all(isinstance(item, dict) for item in objects):
        raise BadRow(f"{column} is not a list of objects")
    return objects


def _unused(row: dict[str, Any], layout: Layout) -> Iterator[str]:
    """Columns that hold something beside a conversation, and that nothing is read from."""
    used = (*layout.columns, *BESIDE_COLUMNS)
    return (column for column, value in row.items() if column not in used and _holds(value))


def _columns(row: dict[str, Any] | str) -> dict[str, Any]:
    if isinstance(row, str):
        raise BadRow(row)
    return row


def documents_of(
    rows: Iterable[Row], bad: BadRows, text_field: str, kind: str, name: str
) -> tuple[Layout | None, list[Document]]:
    """Documents of some rows, and the layout that the first ones decide; None if there is no row.

    Raises:
        LlmqatError: see `layout_of`.
    """
    remaining: Iterator[Row] = iter(rows)
    first, decisive = [], 0
    while decisive < ROWS_TO_DECIDE and (row := next(remaining, None)) is not None:
        first.append(row)
        decisive += isinstance(row[1], dict)
    columns = dict.fromkeys(column for _, row in first if isinstance(row, dict) for column in row)
    if not columns:
        for place, reason in first:  # a row without columns is no row
            bad.add(place, reason or "no columns")
        return None, []
    layout = layout_of(columns, text_field, kind, name)
    documents: list[Document] = []
    for place, values in chain(first, remaining):
        try:
            documents.append(layout.read(_columns(values)))
            if layout.chat:
                bad.unused.update(_unused(_columns(values), layout))
        except BadRow as error:
            bad.add(place, error)
        except RecursionError:
            bad.add(place, "nested too deeply")
    return layout, documents
