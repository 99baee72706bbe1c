"""The tokenizer of a model as GGUF holds it: tokens, kinds, merges or scores, special tokens, chat template.

One that cuts text into words in a way that llama.cpp has no name for is refused, since it would give other tokens.
"""

import json
from pathlib import Path
from typing import Any

from llmqat.errors import LlmqatError
from llmqat.models.gguf_words import WORDS, begins_with_space, steps_of

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


def words_of(tokenizer: dict[str, Any], path: Path) -> str:
    """The name in GGUF of how a tokenizer cuts text into words.

    Raises:
        LlmqatError: if llama.cpp has none that is the same.
    """
    name, no_merges = WORDS.get(steps_of(tokenizer), ("", False))
    normalizer = (tokenizer.get("normalizer") or {}).get("type", "NFC")
    if not name or bool(tokenizer["model"].get("ignore_merges")) != no_merges or normalizer != "NFC":
        known = ", ".join(name for name, _ in WORDS.values())
        raise LlmqatError(
            f"llama.cpp cuts text otherwise than {path} does, into other tokens (known: {known}); export to dense"
        )
    return name
