"""vLLM, offline, in this process: on CPUs with the activations as they were trained, not rounded to int8."""

import os
from typing import Any

import numpy as np

# On CPUs with AMX vLLM runs int4 layers with int8 activations, unless told not to.
SETTINGS = {
    "VLLM_CPU_INT4_W4A8": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


class Vllm:
    """A directory in vLLM."""

    def __init__(self, directory: str, dtype: str, context: int) -> None:
        os.environ.update(SETTINGS)
        from vllm import LLM

        options: dict[str, Any] = {"max_logprobs": -1, "enforce_eager": True, "max_num_seqs": 1, "seed": 0}
        self.llm = LLM(directory, dtype=dtype, max_model_len=context, **options)
        self.tokenizer = self.llm.get_tokenizer()

    def tokens(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self.tokenizer.encode(text)
        return ids

    def run(self, ids: list[int], **options: Any) -> Any:
        """The output of one request."""
        from vllm import SamplingParams

        sampling = SamplingParams(temperature=0.0, detokenize=False, **options)
        (output,) = self.llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)
        return output

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """Tokens that continue `ids`, to the end whatever token says that it has come."""
        return list(self.run(ids, max_tokens=new, ignore_eos=True).outputs[0].token_ids)

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of next tokens, which vLLM gives by token, and the given one first."""
        flat = self.run(ids, max_tokens=1, prompt_logprobs=-1, flat_logprobs=True).prompt_logprobs
        tokens, values = np.array(flat.token_ids), np.array(flat.logprobs, np.float32)
        ends = zip(flat.start_indices[1:], flat.end_indices[1:], strict=True)
        rows = np.empty((len(ids) - 1, tokens.max() + 1), np.float32)
        for row, (start, end) in zip(rows, ends, strict=True):
            row[tokens[start:end]] = values[start:end]
        return rows


def load(directory: str, job: dict[str, Any]) -> Vllm:
    """The model as vLLM serves it."""
    return Vllm(directory, job["dtype"], job["context"])
