"""How a tokenizer cuts text into words, by the names that GGUF has for it.

llama.cpp knows no regular expressions of a file: it has a list of ways to cut text into words, by name. Those that are
exactly a tokenizer.json's are in `WORDS`; a tokenizer that cuts otherwise would give other tokens.
"""

import json
from typing import Any

from tokenizers import Regex, pre_tokenizers

from llmqat.errors import LlmqatError

GPT2 = "GPT-2"  # the expression inside ByteLevel
DIGITS = "each digit"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# How text is cut into words, one after the other -> name in GGUF, and whether a word that is a token needs no merges.
WORDS = {
    (GPT2,): ("gpt-2", False),
    (DIGITS, GPT2): ("smollm", False),
    (LLAMA3,): ("llama-bpe", True),
    (QWEN2,): ("qwen2", False),
}
SAME = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}  # names of older files, and others


def steps_of(tokenizer: dict[str, Any]) -> tuple[str, ...]:
    """The steps of cutting text into words of a tokenizer.json, as `WORDS` has them."""
    cutter = tokenizer.get("pre_tokenizer") or {}
    steps = (_step(part) for part in cutter.get("pretokenizers", [cutter]))
    return tuple(step for step in steps if step)


def _step(part: dict[str, Any]) -> str:
    """A step of cutting text into words; empty for one that cuts nothing."""
    kind = part.get("type")
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return GPT2 if part.get("use_regex", True) else ""
    if kind == "Digits" and part.get("individual_digits"):
        return DIGITS
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert"):
        return str(part["pattern"].get("Regex"))
    return f"unknown: {kind}"


def begins_with_space(tokenizer: dict[str, Any]) -> bool:
    """Whether SentencePiece puts a space before a text."""
    before, cutter = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [*before.get("normalizers", [before]), *cutter.get("pretokenizers", [cutter])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def cut_as(tokenizer: Any, facts: dict[str, Any], name: str) -> None:
    """Let a tokenizer that transformers made of a GGUF file cut text as the file says.

    Args:
        tokenizer: as `AutoTokenizer` gives it; changed.
        facts: the metadata of the file.
        name: of the file, for messages.

    Raises:
        LlmqatError: if it is not known how.
    """
    inner = tokenizer.backend_tokenizer
    if facts["tokenizer.ggml.model"] != "gpt2":
        space = bool(facts.get("tokenizer.ggml.add_space_prefix", True))
        if begins_with_space(json.loads(inner.to_str())) != space:
            raise LlmqatError(
                f"{name} says {'a' if space else 'no'} space before a text, and its tokenizer in transformers does "
                "otherwise; start from the model in safetensors that the file was made of"
            )
        return
    said = facts.get("tokenizer.ggml.pre", "default")
    known = {pre: (steps, no_merges) for steps, (pre, no_merges) in WORDS.items()}
    if SAME.get(said, said) not in known:
        raise LlmqatError(
            f"{name} cuts text in a way that is not known here, {said!r} (known: {', '.join(known)}): its tokens would "
            "be others; start from the model in safetensors that the file was made of"
        )
    steps, no_merges = known[SAME.get(said, said)]
    inner.pre_tokenizer = pre_tokenizers.Sequence([part for step in steps for part in _parts(step)])
    inner.model.ignore_merges = no_merges


def _parts(step: str) -> list[Any]:
    """The parts of a tokenizer that cut text by a step of `WORDS`."""
    if step == DIGITS:
        return [pre_tokenizers.Digits(individual_digits=True)]
    if step == GPT2:
        return [pre_tokenizers.ByteLevel(add_prefix_space=False)]
    expression = pre_tokenizers.Split(Regex(step), behavior="isolated")
    return [expression, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
