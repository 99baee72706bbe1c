"""The tokenizer of a model as GGUF holds it: tokens, kinds, merges or scores, special tokens, chat template.

llama.cpp knows no regular expressions of a file: it has a list of ways to cut text into words, by name. Those that are
exactly a tokenizer.json's are in `WORDS`; a tokenizer that cuts otherwise is refused, since it would give other tokens.
"""

import json
from pathlib import Path
from typing import Any

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
SPACE = "\u2581"  # of SentencePiece


def add_vocabulary(writer: Any, directory: Path, size: int) -> None:
    """Write the tokenizer of `directory` by the `gguf.GGUFWriter`, as `size` tokens: the rows of the embedding.

    Raises:
        LlmqatError: if there is none, it is damaged, or llama.cpp would give other tokens.
    """
    from gguf import SpecialVocab

    path = directory / "tokenizer.json"
    try:
        tokenizer = json.loads(path.read_text("utf-8"))
        model, added = tokenizer["model"], tokenizer["added_tokens"]
        vocabulary = dict(model["vocab"]) | {token["content"]: token["id"] for token in added}
    except OSError as error:
        raise LlmqatError(
            f"{directory} has no tokenizer.json, which a GGUF file holds; save it there with AutoTokenizer"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise LlmqatError(f"{path} is damaged; copy it again, or write the model again") from error
    if max(vocabulary.values()) >= size:
        raise LlmqatError(
            f"{path} has tokens up to {max(vocabulary.values())}, and the model an embedding of {size}; is it the "
            "tokenizer of another model?"
        )
    if model.get("type") != "BPE":
        raise LlmqatError(f"llama.cpp has no tokenizer like {path}, a {model.get('type')} model; export to dense")
    sentencepiece = bool(model.get("byte_fallback"))
    texts = [f"[PAD{index}]" for index in range(size)]
    for token, index in vocabulary.items():
        texts[index] = token
    if sentencepiece:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(begins_with_space(tokenizer))
        writer.add_token_scores(scores(vocabulary, model["merges"], size))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(words_of(tokenizer, path))
    for token in added:
        texts[token["id"]] = token["content"].replace(SPACE, " ") if sentencepiece else token["content"]
    writer.add_token_list(texts)
    writer.add_token_types(kinds(vocabulary, tokenizer, size))
    special = SpecialVocab(directory, load_merges=not sentencepiece, n_vocab=size)
    for end in ("bos", "eos"):  # llama.cpp adds them by the name of the tokenizer where nothing is said
        special.add_special_token.setdefault(end, False)
    special.add_to_gguf(writer, quiet=True)


def kinds(vocabulary: dict[str, int], tokenizer: dict[str, Any], size: int) -> list[int]:
    """Kind of every token: control tokens are never made from text, nor printed."""
    from gguf import TokenType

    found = [int(TokenType.UNUSED)] * size
    unknown = tokenizer["model"].get("unk_token")
    for token, index in vocabulary.items():
        is_byte = len(token) == 6 and token.startswith("<0x") and tokenizer["model"].get("byte_fallback")
        found[index] = int(TokenType.BYTE if is_byte else TokenType.NORMAL)
    for token in tokenizer["added_tokens"]:
        found[token["id"]] = int(TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED)
    if unknown in vocabulary and tokenizer["model"].get("byte_fallback"):
        found[vocabulary[unknown]] = int(TokenType.UNKNOWN)
    return found


def scores(vocabulary: dict[str, int], merges: list[Any], size: int) -> list[float]:
    """SentencePiece's scores, whose order is that of the merges: the earlier a token is made, the higher."""
    found = [-1e6] * size
    for rank, merge in enumerate(merges):
        index = vocabulary["".join(merge.split(" ") if isinstance(merge, str) else merge)]
        found[index] = max(found[index], -float(rank))
    return found


def begins_with_space(tokenizer: dict[str, Any]) -> bool:
    """Whether SentencePiece puts a space before a text."""
    before, cutter = tokenizer.get("normalizer") or {}, tokenizer.get("pre_tokenizer") or {}
    steps = [*before.get("normalizers", [before]), *cutter.get("pretokenizers", [cutter])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def words_of(tokenizer: dict[str, Any], path: Path) -> str:
    """The name in GGUF of how a tokenizer cuts text into words.

    Raises:
        LlmqatError: if llama.cpp has none that is the same.
    """
    cutter = tokenizer.get("pre_tokenizer") or {}
    steps = [_step(part) for part in cutter.get("pretokenizers", [cutter])]
    name, no_merges = WORDS.get(tuple(step for step in steps if step), ("", False))
    normalizer = (tokenizer.get("normalizer") or {}).get("type", "NFC")
    if not name or bool(tokenizer["model"].get("ignore_merges")) != no_merges or normalizer != "NFC":
        known = ", ".join(name for name, _ in WORDS.values())
        raise LlmqatError(
            f"llama.cpp cuts text otherwise than {path} does, into other tokens (known: {known}); export to dense"
        )
    return name


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
