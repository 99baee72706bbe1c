"""llama.cpp on a GGUF of random weights, through the C interface: what `llama-bench` times, a call at a time."""

import time
from pathlib import Path
from typing import Any

import numpy as np

from .shapes import MODELS, ModelShape
from .timing import mean_rate

BATCH = 512
TILE_ROWS = 256
INFO = 2  # log level


def quantized_rows(out: int, inner: int, kind: Any) -> np.ndarray:
    """Random blocks of `out` rows: a few rows quantized by `gguf`, repeated."""
    from gguf import quants

    rows = np.random.default_rng(0).normal(0, 0.02, (min(out, TILE_ROWS), inner)).astype(np.float32)
    blocks = quants.quantize(rows, kind)
    return np.tile(blocks, (-(-out // len(blocks)), 1))[:out]


def tensors_of(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama's tensors; there is no output matrix, so the head is the embedding."""
    kv = shape.kv_heads * shape.head_dim
    block = {
        "attn_norm": (shape.hidden,),
        "attn_q": (shape.hidden, shape.hidden),
        "attn_k": (kv, shape.hidden),
        "attn_v": (kv, shape.hidden),
        "attn_output": (shape.hidden, shape.hidden),
        "ffn_norm": (shape.hidden,),
        "ffn_gate": (shape.intermediate, shape.hidden),
        "ffn_up": (shape.intermediate, shape.hidden),
        "ffn_down": (shape.hidden, shape.intermediate),
    }
    return {
        "token_embd.weight": (shape.vocab, shape.hidden),
        **{f"blk.{i}.{name}.weight": size for i in range(shape.layers) for name, size in block.items()},
        "output_norm.weight": (shape.hidden,),
    }


def write_gguf(path: Path, shape: ModelShape, kind_name: str) -> None:
    """A GGUF of random weights, every matrix of it of one kind (as ``llama-quantize --pure``), without a tokenizer."""
    import gguf

    kind = gguf.GGMLQuantizationType[kind_name]
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "llama")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.intermediate)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")
    for name, size in tensors_of(shape).items():
        if len(size) == 1:
            writer.add_tensor(name, np.ones(size, np.float32))
        else:
            writer.add_tensor(name, quantized_rows(*size, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(path)


def print_log(level: int, text: bytes, _: Any) -> None:
    """What llama.cpp says about a model, which buffer type its weights are in among it; not its debug messages."""
    if level >= INFO:
        print(text.decode(errors="replace"), end="", flush=True)


class Worker:
    """Times a model in one of llama.cpp's formats.

    Args:
        threads: of llama.cpp.
        directory: scratch folder for GGUF files.
        kind: Q4_0 or Q8_0.
    """

    def __init__(self, threads: int, directory: Path, kind: str) -> None:
        import llama_cpp

        self.api, self.threads, self.directory, self.kind = llama_cpp, threads, directory, kind
        self.log = llama_cpp.llama_log_callback(print_log)  # the C side keeps the pointer only
        self.api.llama_log_set(self.log, None)
        self.api.llama_backend_init()
        self.model: Any = None
        self.context: Any = None

    def describe(self) -> dict[str, Any]:
        """Instructions and threads that llama.cpp says it uses."""
        return {"system": self.api.llama_print_system_info().decode(), "threads": self.threads}

    def path(self, shape: str) -> Path:
        """Where the GGUF of a shape is."""
        return self.directory / f"{shape}-{self.kind}.gguf"

    def build_model(self, shape: str) -> dict[str, Any]:
        """Write the GGUF, if it is not there."""
        if not self.path(shape).exists():
            write_gguf(self.path(shape), MODELS[shape], self.kind)
        return {"file_bytes": self.path(shape).stat().st_size}

    def open_model(self, shape: str) -> dict[str, Any]:
        """Load a model; a prefill and a few steps to warm it."""
        self.close()
        started = time.perf_counter()
        self.model = self.api.llama_model_load_from_file(
            str(self.path(shape)).encode(), self.api.llama_model_default_params()
        )
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {self.path(shape).name}")
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = MODELS[shape].context, BATCH, BATCH
        params.n_threads = params.n_threads_batch = self.threads
        self.context = self.api.llama_init_from_model(self.model, params)
        self.vocab = MODELS[shape].vocab
        loaded = time.perf_counter() - started
        self.steps(16, 4)
        return {"load_seconds": loaded}

    def run(self, tokens: np.ndarray) -> None:
        """One batch of ids; its logits are there when this returns."""
        ids = (self.api.llama_token * len(tokens))(*tokens.tolist())
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError(f"llama_decode failed on {len(tokens)} tokens")
        self.api.llama_synchronize(self.context)

    def start(self, prompt: int) -> float:
        """Seconds of a prompt of random ids in an empty context."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        ids = np.random.default_rng(prompt).integers(self.vocab, size=prompt)
        started = time.perf_counter()
        for first in range(0, prompt, BATCH):
            self.run(ids[first : first + BATCH])
        return time.perf_counter() - started

    def steps(self, prompt: int, tokens: int) -> float:
        """Seconds of `tokens` single steps after a prompt, on ids drawn beforehand."""
        self.start(prompt)
        ids = np.random.default_rng(0).integers(self.vocab, size=(tokens, 1))
        started = time.perf_counter()
        for token in ids:
            self.run(token)
        return time.perf_counter() - started

    def prefill_tok_s(self, prompt: int, seconds: float) -> float:
        """Tokens of the prompt a second."""
        return mean_rate(prompt, lambda: self.start(prompt), seconds)

    def decode_tok_s(self, prompt: int, tokens: int, seconds: float) -> float:
        """Tokens a second after the prompt; choosing the next one is not in it, to llama.cpp's advantage."""
        return mean_rate(tokens, lambda: self.steps(prompt, tokens), seconds)

    def close(self) -> None:
        """Free context and model."""
        if self.context is not None:
            self.api.llama_free(self.context)
        if self.model is not None:
            self.api.llama_model_free(self.model)
        self.model = self.context = None
