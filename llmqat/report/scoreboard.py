"""The scoreboard: the same tokens scored by the float model, by its quantized versions, and by the packed file."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmqat.config import BASELINES
from llmqat.metrics.perplexity import Perplexity

if TYPE_CHECKING:
    from rich.table import Table

# Variants of the model, in the order of the scoreboard -> how it calls them.
LABELS = {
    "float": "float",
    "float_finetuned": "float, fine-tuned",
    "rtn": "round to nearest",
    "gptq": "GPTQ",
    "blockwise": "block-wise reconstruction",
    "given": "codes given",
    "auto-round": "AutoRound",
    "llm-compressor": "llm-compressor, GPTQ",
    "qat": "trained (fake-quant)",
    "packed": "packed file, kernel op",
}
VARIANTS = tuple(LABELS)
# Those of them that quantize after training, by llmqat and by other tools: what training is to beat.
POST_TRAINING = ("rtn", "gptq", "blockwise", "given", *BASELINES)


def score_rows(results: Mapping[str, Perplexity]) -> list[tuple[str, str, str, str, str]]:
    """Rows of the scoreboard: name, perplexity, change against float, KL to float, top-1 agreement.

    Args:
        results: by variant of the model. `VARIANTS` come first, in that order; others follow under their own names.
    """
    base, rows = results.get("float"), []
    others = [variant for variant in results if variant not in VARIANTS]
    for variant in [*(variant for variant in VARIANTS if variant in results), *others]:
        result = results[variant]
        change = "" if base is None or variant == "float" else f"{result.perplexity / base.perplexity - 1:+.2%}"
        kl = "" if result.kl_to_float is None else f"{result.kl_to_float:.5f}"
        top1 = "" if result.top1_agreement is None else f"{result.top1_agreement:.2%}"
        rows.append((LABELS.get(variant, variant), f"{result.perplexity:.4f}", change, kl, top1))
    return rows


def scoreboard(results: Mapping[str, Perplexity], title: str | None = None) -> "Table":
    """The scoreboard as a rich table: a notebook shows it as it is, a terminal by ``rich.print``.

    Args:
        results: what `llmqat.evaluate` gave, by variant of the model: float, rtn, gptq, qat, packed, or other names.
        title: above the table.

    Returns:
        a row each: perplexity, change against float, KL to float (nats per token), top-1 agreement.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=None if title is None else Text(title, "table.title"))
    table.add_column("")
    for name in ("perplexity", "vs float", "KL to float", "top-1"):
        table.add_column(name, justify="right")
    for row in score_rows(results):
        table.add_row(*map(Text, row))
    return table
