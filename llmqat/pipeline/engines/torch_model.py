"""Any model that is called, and generates, like one of transformers."""

from typing import Any

import numpy as np


class TorchModel:
    """A model of transformers, or one in its shape, with its tokenizer, where texts are to be cut."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer

    def tokens(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self.tokenizer(text)["input_ids"]
        return ids

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """Tokens that continue `ids`, to the end whatever token says that it has come."""
        import torch

        prompt = torch.tensor([ids])
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        out = self.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        tokens: list[int] = out[0, len(ids) :].tolist()
        return tokens

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of next tokens, from one forward without a cache."""
        import torch

        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        found: np.ndarray = logits.double().log_softmax(-1).float().numpy()
        return found
