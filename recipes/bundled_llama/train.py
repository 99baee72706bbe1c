"""Train the Llama that ships inside llmqat, from nothing but the Python standard library's source text.

    python recipes/bundled_llama/train.py --output runs/bundled_llama            # about an hour on 2 cores
    python recipes/bundled_llama/train.py --output runs/bundled_llama --resume   # after an interruption

Deterministic for a given Python, torch and thread count: the tokenizer, the initial weights and the order of the blocks
follow from the seed and the step alone, so a resumed run takes the same steps. `card.py` measures the result and writes
its model card.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmqat.data.stdlib import stdlib_texts

VOCAB_SIZE = 4096
LENGTH = 512
BATCH = 16  # blocks a step
STEPS = 1500
WARMUP = 40
LR = 3e-3
WEIGHT_DECAY = 0.1
SEED = 0

# Every Linear is divisible by 128 both ways; 5.8 M parameters, 11.6 MB in bfloat16.
CONFIG = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=LENGTH,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; one <s> opens every text and closes the one before it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>", model_max_length=LENGTH
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, split: str) -> torch.Tensor:
    """All texts of a split, each opened by <s>, as one row of ids."""
    encoded = tokenizer(stdlib_texts(split))["input_ids"]
    return torch.tensor([token for ids in encoded for token in ids])


def batch_of_step(stream: torch.Tensor, step: int) -> torch.Tensor:
    """Blocks of `step`: every epoch cuts the stream at a new offset and shuffles the blocks, all from the seed."""
    per_epoch = (len(stream) - LENGTH) // LENGTH // BATCH
    epoch, index = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + epoch)
    offset = int(torch.randint(LENGTH, (), generator=generator))
    order = torch.randperm(per_epoch * BATCH, generator=generator)
    starts = offset + LENGTH * order[index * BATCH : (index + 1) * BATCH]
    return torch.stack([stream[start : start + LENGTH] for start in starts])


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the block matrices (about half the tokens of AdamW to the same loss), AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=LR, weight_decay=0.0, betas=(0.9, 0.95), fused=True),
    ]


def lr_at(step: int) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < WARMUP:
        return LR * (step + 1) / WARMUP
    return LR * 0.5 * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP)))


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean token loss over the whole validation stream, in sequences of `LENGTH`."""
    sequences = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    losses = [loss_of(model, batch).item() * len(batch) for batch in sequences.split(BATCH)]
    return sum(losses) / len(sequences)


def loss_of(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    """Next-token cross-entropy of one batch under bfloat16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=batch, labels=batch).loss


def save_checkpoint(path: Path, step: int, model: LlamaForCausalLM, opts: list[torch.optim.Optimizer]) -> None:
    """Write beside and rename: an interrupted save leaves the previous checkpoint whole."""
    state = {"step": step, "model": model.state_dict(), "optimizers": [opt.state_dict() for opt in opts]}
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def fit(output: Path, resume: bool) -> None:
    """Train to `STEPS`, logging to `log.jsonl`, then write the bfloat16 model and its tokenizer to `output`."""
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    tokenizer = train_tokenizer(stdlib_texts("train"))
    streams = {split: token_stream(tokenizer, split) for split in ("train", "validation")}
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    opts = optimizers(model)
    checkpoint, first = output / "checkpoint.pt", 0
    if resume and checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for opt, opt_state in zip(opts, state["optimizers"], strict=True):
            opt.load_state_dict(opt_state)
        first = state["step"]
    compiled = torch.compile(model)
    log = (output / "log.jsonl").open("a" if first else "w")
    started = time.time()
    for step in range(first, STEPS):
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr_at(step)
        loss = loss_of(compiled, batch_of_step(streams["train"], step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        done = step + 1
        if done % 10 == 0 or done == STEPS:
            row = {"step": done, "tokens": done * BATCH * LENGTH, "loss": loss.item(), "seconds": time.time() - started}
            if done % 100 == 0 or done == STEPS:
                row["validation_loss"] = validation_loss(model, streams["validation"])
                save_checkpoint(checkpoint, done, model, opts)
            print(json.dumps(row), file=log, flush=True)
            print(row, flush=True)
    export(model, tokenizer, output / "model")


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Save in bfloat16. Not by ``model.to(bfloat16)``, which would cast the rotary frequencies too."""
    rounded = LlamaForCausalLM._from_config(model.config, dtype=torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints, log and the finished model")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    args = parser.parse_args()
    fit(args.output, args.resume)
