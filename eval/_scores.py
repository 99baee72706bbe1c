"""The scores of a quantized model that tables show."""

from typing import Any

import llmqat


def scores(model: Any, windows: llmqat.Windows, reference: llmqat.FloatCopy) -> dict[str, float]:
    """Perplexity, KL divergence from the float model and top-1 agreement with it."""
    found = llmqat.evaluate(model, windows, reference)
    return {"perplexity": found.perplexity, "kl": found.kl_to_float, "top1": found.top1_agreement}
