"""Passages of a text on which two engines are compared: what a model says of them, and how it goes on."""

from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple, Self

from llmqat.data.text_files import read_text
from llmqat.errors import LlmqatError

COUNT, LENGTH, PROMPT, NEW = 5, 96, 16, 64
LONGEST_TOKEN = 16  # characters; more of a text than it takes for a passage is not cut into tokens
BUNDLED = "passages.txt"


class Passages(NamedTuple):
    """Passages of a text, cut into tokens.

    Attributes:
        texts: one a passage, which may be longer than it.
        ids: tokens of each.
        prompt: how many tokens of a passage are continued.
        new: by how many.
        context: tokens that an engine needs room for.
    """

    texts: list[str]
    ids: list[list[int]]
    prompt: int
    new: int
    context: int

    @classmethod
    def of(cls, file: str | None, tokenizer: Any, limit: int | None) -> Self:
        """Passages from equal parts of a text.

        Args:
            file: with the text; None for the text inside this package.
            tokenizer: of the model.
            limit: positions of the model.

        Raises:
            LlmqatError: if the text is too short, or cannot be read.
        """
        text = read_text(Path(file)) if file else (files("llmqat.pipeline") / BUNDLED).read_text("utf-8")
        room = min(LENGTH, (limit or LENGTH + 1) - 1)
        prompt = min(PROMPT, room // 2)
        new = min(NEW, (limit or PROMPT + NEW) - prompt)
        share = len(text) // COUNT
        texts = [text[part * share :][: min(share, LENGTH * LONGEST_TOKEN)] for part in range(COUNT)]
        ids = [tokenizer(part)["input_ids"][:room] for part in texts]
        least = min(map(len, ids))
        if least <= prompt:
            raise LlmqatError(
                f"a {COUNT}th of {file or 'the bundled text'} gives {least} tokens, and {prompt + 1} are needed; give "
                "a longer --text"
            )
        return cls(texts, ids, prompt, new, max(room + 1, prompt + new))
