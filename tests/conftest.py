"""Fixtures shared by all tests."""

import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Triton's kernels run on CPU tensors. It asks when it is first imported, which peft does.
os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import is_initialized
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from llmqat.config import Recipe
from llmqat.scheme import QuantScheme
from tests.pretended_device import PretendedDevice, entered

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "attn_implementation": "sdpa",
}


# Processes of their own for a second's price: forked from a server that has the libraries loaded.
multiprocessing.get_context("forkserver").set_forkserver_preload(["llmqat.pipeline.run", "datasets", "pytest"])

COMMON = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
}
GATED = COMMON | {"num_key_value_heads": 2, "head_dim": 16}
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


class Family(NamedTuple):
    """A row of the support table: its name there, the config of a tiny model, and the class of its head."""

    name: str
    config: dict[str, Any]
    head: Any = AutoModelForCausalLM


FAMILIES = {
    "llama": Family("Llama", GATED),
    "mistral": Family("Mistral", GATED),
    "qwen2": Family("Qwen2, Qwen2.5", GATED),
    "qwen3": Family("Qwen3", GATED),
    "gemma": Family("Gemma", GATED),
    "gemma2": Family("Gemma 2", GATED | {"sliding_window": 16}),
    "gemma3_text": Family(
        "Gemma 3 (text)", GATED | {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
    ),
    "phi3": Family("Phi-3", GATED | IDS),
    "gpt2": Family(
        "GPT-2",
        {"vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.15}
        | IDS,
    ),
    "opt": Family("OPT", COMMON | {"ffn_dim": 96, "word_embed_proj_dim": 64, "init_std": 0.15} | IDS),
    "bert": Family("BERT, classification head", COMMON | {"num_labels": 3}, AutoModelForSequenceClassification),
    "roberta": Family(
        "RoBERTa, classification head",
        COMMON | {"num_labels": 3, "max_position_embeddings": 160},  # positions start behind the padding id
        AutoModelForSequenceClassification,
    ),
    "distilbert": Family(
        "DistilBERT, classification head",
        {"vocab_size": 128, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}
        | {"initializer_range": 0.15, "num_labels": 3},
        AutoModelForSequenceClassification,
    ),
}


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """``tiny_llama(**config)``: a random two-layer Llama in eval mode; the same one for the same arguments."""

    def make(**overrides: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**TINY | overrides)).eval()

    return make


@pytest.fixture(scope="session")
def tiny_moe() -> Callable[..., PreTrainedModel]:
    """``tiny_moe(model_type, **config)``: like `tiny_llama`, with 6 experts, 2 of them for each token. Qwen3's second
    block has an ordinary MLP."""
    sizes: dict[str, Any] = {
        "mixtral": {"num_local_experts": 6},
        "qwen3_moe": {"num_experts": 6, "moe_intermediate_size": 48, "mlp_only_layers": [1], "head_dim": 16},
        "gpt_oss": {"num_local_experts": 6, "head_dim": 16, "attn_implementation": "eager"},
    }

    def make(model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        config = CONFIG_MAPPING[model_type](**TINY | sizes[model_type] | {"num_experts_per_tok": 2} | overrides)
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    return make


@pytest.fixture(scope="session")
def families() -> dict[str, Family]:
    """Model type -> a tiny model of the family."""
    return FAMILIES


@pytest.fixture(scope="session")
def tiny() -> Callable[..., PreTrainedModel]:
    """``tiny(model_type)``: a random two-block model in eval mode, its norms and biases not trivial."""

    def make(model_type: str, **overrides: Any) -> PreTrainedModel:
        torch.manual_seed(0)
        family = FAMILIES[model_type]
        model = family.head.from_config(CONFIG_MAPPING[model_type](**family.config | overrides)).eval()
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn_like(parameter)
        return model

    return make


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedDevice]:
    """A machine that has a device beside its CPU; see tests/pretended_device.py."""
    with entered(monkeypatch) as device:
        yield device
    if is_initialized():  # accelerate remembers the device for the whole process
        PartialState().device = torch.device("cpu")


@pytest.fixture
def reference_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """`packed_linear` runs its torch reference, which repeats the training forward bit for bit."""
    from llmqat.kernels import native

    monkeypatch.setattr(native, "supports", lambda *_: False)


@pytest.fixture
def tokens() -> list[torch.Tensor]:
    """Four calibration batches of token ids ``(2, 24)``."""
    return list(torch.randint(0, TINY["vocab_size"], (4, 2, 24)))


@pytest.fixture(params=[True, False], ids=["sym", "asym"])
def symmetric(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=[2, 3, 4, 8], ids="{}bit".format)
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def scheme(bits: int, symmetric: bool) -> QuantScheme:
    """Every width, symmetric and not, in groups of 16."""
    return QuantScheme(bits, 16, symmetric)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, and BOS and EOS: 258 ids."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's way to cut text, a token per byte and two that are merged: 260 ids."""
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "de", "def"]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("d", "e"), ("de", "f")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", chat_template="{{ messages }}"
    )


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny random Llama in bfloat16 and its tokenizer, saved; not to be written to."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(LlamaConfig(**TINY | {"vocab_size": 258}), dtype=torch.bfloat16).save_pretrained(
        folder
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tied_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The model of `model_dir` with its output head tied to the embedding; not to be written to."""
    folder = tmp_path_factory.mktemp("models") / "tied"
    torch.manual_seed(0)
    config = LlamaConfig(**TINY | {"vocab_size": 258, "tie_word_embeddings": True})
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """800 short lines of a few words."""
    words, draw = ["def", "return", "self", "for", "in", "range", "print", "x", "y", "value", "index"], random.Random(0)
    path = tmp_path_factory.mktemp("data") / "words.txt"
    path.write_text("".join(" ".join(draw.choices(words, k=6)) + "\n" for _ in range(800)))
    return path


@pytest.fixture
def papers_hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A Hub that holds the sets of `llmqat.data.named_sets`, in small: the texts of each split by ``"c4 train"`` (set
    and split), the names papers use for what they score. ``"asked"`` lists what was loaded."""
    import datasets

    draw = random.Random(3)

    def texts(count: int, longest: int) -> list[str]:
        return ["", *("".join(draw.choices("abcdef gh\n", k=draw.randint(1, longest))) for _ in range(count - 1))]

    texts_of = {f"wikitext2 {split}": texts(30, 60) for split in ("train", "validation", "test")}
    texts_of |= {f"ptb {split}": texts(30, 60) for split in ("train", "validation", "test")}
    texts_of |= {"c4 train": texts(40, 90), "c4 validation": texts(1200, 60), "asked": []}
    sources = {
        ("Salesforce/wikitext", "wikitext-2-raw-v1", None): ("wikitext2", "text"),
        ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet"): ("ptb", "sentence"),
        ("allenai/c4", None, None): ("c4", "text"),
    }
    files = {
        "ptb": "penn_treebank/{split}/*.parquet",
        "c4": {"train": "en/c4-train.00000-of-01024.json.gz", "validation": "en/c4-validation.00000-of-00008.json.gz"},
    }

    def load_dataset(hub: str, config: Any, *, data_files: Any, revision: Any, split: str, streaming: bool) -> Any:
        name, column = sources[hub, config, revision]
        if name in files:
            expected = files[name] if isinstance(files[name], str) else files[name][split]
            assert data_files == {split: expected.format(split=split)}
        texts_of["asked"].append(f"{name} {split}")
        loaded = datasets.Dataset.from_dict({column: texts_of[f"{name} {split}"]})
        return loaded.to_iterable_dataset() if streaming else loaded

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return texts_of


@pytest.fixture(scope="session")
def small_recipe(model_dir: Path, text_file: Path) -> Callable[..., Recipe]:
    """``small_recipe(output, {"train.mode": "lora"})``: a run of a second on the tiny model, with changes."""
    small = {
        "model": str(model_dir),
        "data.dataset": str(text_file),
        "init.samples": 8,
        "train.max_steps": 4,
        "data.length": 32,
        "train.batch_size": 4,
        "train.lr": 0.005,
        "train.eval_every": 2,
        "train.save_every": 2,
        "eval.window": 32,
        "eval.tokens": 512,
        "eval.validation_tokens": 256,
        "eval.repeats": 0,
    }
    return lambda output, changes=None: Recipe().with_values({**small, "output": str(output), **(changes or {})})


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, small_recipe: Callable[..., Recipe]) -> Path:
    """The directory of a finished LoRA run; not to be written to."""
    from llmqat.pipeline.run import run

    directory = tmp_path_factory.mktemp("runs") / "finished"
    run(small_recipe(directory, {"train.mode": "lora"}))
    return directory


@pytest.fixture(scope="session")
def call() -> Callable[..., int]:
    """``call([arguments])``: the exit code of a command line, run in this process."""
    from llmqat.cli import main

    def run(argv: list[object]) -> int:
        try:
            return main([str(argument) for argument in argv])
        except SystemExit as stopped:
            return stopped.code

    return run


@pytest.fixture(scope="session")
def quantize_flags() -> list[str]:
    """Flags of a run of a second without training."""
    return ["--calibration-samples", "8", "--length", "32", "--window", "32", "--eval-tokens", "512", "--repeats", "0"]


@pytest.fixture(scope="session")
def small_flags(quantize_flags: list[str]) -> list[str]:
    """Flags of a run of a second."""
    training = "--max-steps 4 --batch-size 4 --eval-every 2 --save-every 2 --validation-tokens 256"
    return [*quantize_flags, *training.split()]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of the tests themselves."""
    parser.addoption("--write-support", action="store_true", help="write the table of docs/support.md")
    parser.addoption("--every-family", action="store_true", help="run tests/families on all kinds of models, not a few")
    parser.addoption("--write-families", action="store_true", help="write docs/families.md, with --every-family")
    parser.addoption("--write-api", action="store_true", help="write the tables of docs/api.md")
    parser.addoption("--kill-points", default="0:3", metavar="FIRST:END", help="random points of test_kill_points.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test per random kill point."""
    if "kill_point" in metafunc.fixturenames:
        first, end = map(int, metafunc.config.getoption("--kill-points").split(":"))
        metafunc.parametrize("kill_point", range(first, end))
