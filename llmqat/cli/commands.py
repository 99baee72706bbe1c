"""What each sub-command does: `llmqat finetune | quantize | eval | verify | report | generate | inspect | recipes`."""

import argparse
import json
from pathlib import Path
from typing import Any

from llmqat.cli.flags import recipe_from
from llmqat.cli.parser import EVAL_DATA_FIELDS
from llmqat.cli.recipes import bundled_recipes, bundled_scripts, command_of, find_recipe
from llmqat.config import DataConfig
from llmqat.errors import LlmqatError


def run_finetune(args: argparse.Namespace, train: bool = True) -> None:
    """`llmqat finetune`."""
    from llmqat.pipeline.run import RECIPE, run

    saved = Path(args.resolved.output) / RECIPE
    if args.resume and not args.recipe and saved.exists():
        args.recipe = str(saved)
        args.resolved = recipe_from(args)
    run(args.resolved, train=train, resume=args.resume, overwrite=args.overwrite)


def run_quantize(args: argparse.Namespace) -> None:
    """`llmqat quantize`."""
    from llmqat.pipeline.low_memory import quantize_by_block

    if not args.low_memory:
        run_finetune(args, train=False)
        return
    if args.resume:
        raise LlmqatError("--low-memory keeps nothing to go on from: leave it out, or --resume")
    quantize_by_block(args.resolved, args.overwrite)


def run_inspect(args: argparse.Namespace) -> None:
    """`llmqat inspect`."""
    from llmqat.report.plan import describe, inspect

    if args.machine:
        return print_machine()
    print(describe(inspect(args.resolved)))


def print_machine() -> None:
    """What `inspect --machine` shows."""
    from llmqat.kernels.native import explain
    from llmqat.machine import environment

    for key, value in environment().items():
        print(f"{key:>13}: {value or '-'}")
    print(f"{'kernels':>13}: {explain()}")


def load_any(name: str, dtype: Any = None, activations: Any = None) -> tuple[Any, Any]:
    """A float or packed model, and its tokenizer."""
    from llmqat.formats.reader import is_packed, load_packed, local_directory
    from llmqat.models.loading import load_float, load_tokenizer, resolve_name

    directory = local_directory(resolve_name(name))
    if is_packed(directory):
        model: Any = load_packed(directory, dtype, activations=activations)
    elif activations:
        raise LlmqatError(f"--activations {activations} is for packed models; {name} is a float model")
    else:
        model = load_float(str(directory), dtype)
    return model, load_tokenizer(str(directory))


def run_eval(args: argparse.Namespace) -> None:
    """`llmqat eval`."""
    import torch

    from llmqat.kernels.native import kernel_name
    from llmqat.machine import environment
    from llmqat.metrics.perplexity import evaluate
    from llmqat.metrics.throughput import throughput
    from llmqat.models.float_view import FloatCopy
    from llmqat.pipeline.inputs import eval_windows
    from llmqat.serve.activations import AsTrained

    if any(given is not None and given < 2 for given in (args.window, args.eval_tokens)):
        raise LlmqatError("--window and --eval-tokens must be at least 2")
    model, tokenizer = load_any(args.model, torch.float32, args.activations)
    context = getattr(model.config, "max_position_embeddings", None)
    source = DataConfig(args.dataset, **{name: getattr(args, name) for name in EVAL_DATA_FIELDS})
    data = eval_windows(source, tokenizer, context, args.window, args.eval_tokens, args.bos)
    reference = FloatCopy(load_any(args.against, torch.float32)[0]) if args.against else None
    result = evaluate(model, data, reference)
    numbers = {
        "model": args.model,
        "dataset": args.dataset,
        "perplexity": result.perplexity,
        "kl_to_float": result.kl_to_float,
        "top1_agreement": result.top1_agreement,
        "protocol": data.protocol,
        "window": args.window or data.ids.shape[-1],
        "scored": "answers of conversations" if data.is_chat else None,
        "bos": data.bos,
        "tokens": data.tokens,
        "sha256": data.sha256,
        "kernel": kernel_name(),
    }
    if args.activations:
        trained = evaluate(model, data, AsTrained(model))
        numbers |= {"activations": f"{args.activations}, not as trained", "kl_to_trained": trained.kl_to_float}
        numbers |= {"top1_to_trained": trained.top1_agreement}
    if args.throughput:
        context = context or 320
        new_tokens = min(64, context // 2)
        speed = throughput(load_any(args.model, None, args.activations)[0], min(256, context - new_tokens), new_tokens)
        numbers |= {"prefill_tok_s": speed.prefill_tok_s, "decode_tok_s": speed.decode_tok_s}
    for key, value in numbers.items():
        if value is not None:
            print(f"{key:<16} {value:.6g}" if isinstance(value, float) else f"{key:<16} {value}")
    if args.json:
        Path(args.json).write_text(json.dumps({**numbers, "environment": environment()}, indent=2) + "\n")


def run_verify(args: argparse.Namespace) -> None:
    """`llmqat verify`."""
    from llmqat.formats.verify import verify

    check = verify(args.model, logits=not args.no_logits)
    print(
        f"layers           {check.layers}\ncodes equal      {check.codes_equal}\nscales equal     {check.scales_equal}"
    )
    if check.max_logit_error is not None:
        print(f"max logit error  {check.max_logit_error:.3e}\nbound            {check.bound:.3e}")
    if not check.ok:
        where = f": {', '.join(check.mismatched[:5])}" if check.mismatched else " in its logits"
        raise LlmqatError(f"{args.model} is not what was trained{where}; copy it again, or write it again")


def run_report(args: argparse.Namespace) -> None:
    """`llmqat report`."""
    from llmqat.report.page.render import write_page

    print(write_page(args.model))


def run_generate(args: argparse.Namespace) -> None:
    """`llmqat generate`."""
    import torch

    from llmqat.data.template import as_question
    from llmqat.nn.context import check_sequence

    model, tokenizer = load_any(args.model, None, args.activations)
    text = as_question(tokenizer, args.prompt) if args.chat else args.prompt
    encoded = tokenizer(text, add_special_tokens=not args.chat)
    ids = torch.tensor([encoded["input_ids"]], device=model.device)
    check_sequence(model, ids, args.max_new_tokens - 1)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.max_new_tokens, **sampling)
    print(tokenizer.decode(output[0, ids.shape[1] if args.chat else 0 :], skip_special_tokens=True))


def run_recipes(args: argparse.Namespace) -> None:
    """`llmqat recipes`."""
    scripts = bundled_scripts()
    if args.name:
        print((scripts.get(args.name) or find_recipe(args.name)).read_text("utf-8"), end="")
        return
    for name, path in {**bundled_recipes(), **scripts}.items():
        print(f"{name:<20} {command_of(path)}")


COMMANDS = {
    "finetune": run_finetune,
    "quantize": run_quantize,
    "eval": run_eval,
    "verify": run_verify,
    "report": run_report,
    "generate": run_generate,
    "inspect": run_inspect,
    "recipes": run_recipes,
}
