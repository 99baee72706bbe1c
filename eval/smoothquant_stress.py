"""SmoothQuant under stress: outliers that leave the float model as it is, and what they do to int8 activations.

    python eval/smoothquant_stress.py --model llama --factors 16 64 256

Some channels of every norm are multiplied by a factor and the columns of the linears that read it divided by it, so the
float model computes the same; likewise the rows of up_proj and the columns of down_proj, where large models have their
massive activations. Round to nearest then loses the model, and smoothing has to bring it back. Prints perplexity by
scheme and factor, and writes --output with machine, versions, windows, token count and the hash of the ids.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch

import llmqat
from llmqat import QuantScheme

SCHEMES = {"W8A8": QuantScheme(8, -1, act_bits=8), "W4A8": QuantScheme(4, 32, act_bits=8)}
SMOOTHING = {"none": None, "0.5": 0.5, "auto": "auto"}
CHANNELS = 4
LENGTH, BATCH = 512, 8


@torch.no_grad()
def inject(model: Any, factor: float, channels: int = CHANNELS, seed: int = 0) -> None:
    """Multiply random channels of every site of a Llama by `factor`, in place; the function stays the same."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        sites = [
            (block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
            (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            (mlp.up_proj, [mlp.down_proj]),
        ]
        for source, readers in sites:
            chosen = torch.randperm(len(source.weight), generator=generator)[:channels]
            source.weight[chosen] *= factor
            for reader in readers:
                reader.weight[:, chosen] /= factor


def main() -> None:
    """Run the grid of factors, schemes and smoothing; print a table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama", help="a Llama: directory, Hub id or llama")
    parser.add_argument("--dataset", default="stdlib")
    parser.add_argument("--factors", type=float, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--samples", type=int, default=32, help="calibration sequences")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=32768)
    parser.add_argument("--output", type=Path, default=Path("eval/results/smoothquant_stress.json"))
    args = parser.parse_args()
    model = llmqat.load_float(args.model, torch.float32)
    tokenizer, corpus = llmqat.load_tokenizer(args.model), llmqat.load_corpus(args.dataset)
    rows = llmqat.split_stream(llmqat.encode(tokenizer, corpus.train), LENGTH, "calibration")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: args.samples]
    batches = list(rows[order].split(BATCH))
    test = llmqat.windows(tokenizer, corpus.test, args.window, args.eval_tokens)
    result: dict[str, Any] = {
        "environment": llmqat.environment(),
        "model": args.model,
        "dataset": args.dataset,
        "window": args.window,
        "tokens": {
            "eval": test.tokens,
            "eval_sha256": test.sha256,
            "calibration": sum(batch.numel() for batch in batches),
        },
        "channels": CHANNELS,
        "points": [],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for factor in args.factors:
        stressed = copy.deepcopy(model)
        inject(stressed, factor)
        base = llmqat.evaluate(stressed, test).perplexity
        print(f"outliers x{factor:g}: float {base:.4f}", flush=True)
        for name, scheme in SCHEMES.items():
            for label, alpha in SMOOTHING.items():
                quantized = copy.deepcopy(stressed)
                if alpha is not None:
                    llmqat.smooth(quantized, batches, alpha, scheme=scheme)
                llmqat.prepare(quantized, scheme)
                perplexity = llmqat.evaluate(quantized, test).perplexity
                result["points"].append(
                    {"factor": factor, "scheme": name, "smooth": label, "float": base, "perplexity": perplexity}
                )
                args.output.write_text(json.dumps(result, indent=2) + "\n")
                print(f"  {name} smooth {label:>4}: {perplexity:12.4f} {perplexity / base - 1:+9.2%}", flush=True)


if __name__ == "__main__":
    main()
