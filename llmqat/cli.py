"""The command line: `llmqat finetune | quantize | eval | verify | report | generate | inspect | recipes`."""

import argparse
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmqat import __version__
from llmqat.cli_options import (
    Parser,
    add_fields,
    add_recipe_flags,
    bundled_recipes,
    bundled_scripts,
    command_of,
    find_recipe,
    recipe_from,
)
from llmqat.config import BOS_RULES, DataConfig
from llmqat.errors import LlmqatError
from llmqat.processes import is_first, process_index

FINETUNE = """\
Fine-tune a model through its own integer grid, pack it, and prove and measure the packed file.

  llmqat finetune --model llama --bits 4
      the small Llama inside this package, on the source text of Python's standard library: no network needed
  llmqat finetune --model meta-llama/Llama-3.2-1B --dataset wikitext:wikitext-2-raw-v1 --bits 4 --output out
  llmqat finetune --model ./my-model --dataset my.jsonl --bits 4 --train lora --output out
  llmqat finetune --model ./my-model --dataset chats.jsonl --bits 4 --output out
      conversations (messages, prompt/completion, instruction/output): chat template, loss on the answers only
  llmqat finetune --model ./my-model --dataset my.txt --bits 4 --act-bits 8 --smooth auto --output out
  llmqat finetune --output out --resume
      go on after an interruption, with the options of the first call

Writes to --output: the packed model (safetensors, config, tokenizer), recipe.yaml, report.json, report.html (look at it
in a browser), README.md, and checkpoint/, which --resume needs and you may delete.
"""
QUANTIZE = """\
Quantize without training: round to nearest or GPTQ, packed, verified and measured like a fine-tuned model.

  llmqat quantize --model llama --bits 4 --output out
  llmqat quantize --model ./my-model --bits 8 --group-size -1 --act-bits 8 --smooth auto --output out
  llmqat quantize --model ./my-model --bits 4 --override 'down_proj$:bits=8' --output out
  llmqat quantize --model ./large-model --bits 4 --low-memory --output out
      one block of the model in memory at a time; nothing is measured: llmqat eval and llmqat verify do that afterwards
  llmqat quantize --output out --resume
      go on after an interruption, from the blocks that are done
"""
EVAL = """\
Perplexity of a float or packed model, by the GPTQ protocol; against a float model also KL and top-1 agreement.

  llmqat eval runs/llmqat
  llmqat eval runs/llmqat --against llama --throughput
  llmqat eval ./my-model --dataset wikitext2
      as papers report it: windows of 2048; so are c4, c4-new, ptb and ptb-new, under the names of GPTQ's code
  llmqat eval ./my-model --dataset my-org/my-texts --window 2048 --eval-tokens 400000
"""
VERIFY = """\
Prove that a packed directory holds the codes and scales of training, bit for bit, and runs as what was trained.

  llmqat verify runs/llmqat
"""
REPORT = """\
Write report.html of a finished run again, from its report.json and details.json: one page that needs nothing else.

  llmqat report runs/llmqat
"""
GENERATE = """\
Continue a text with a float or packed model.

  llmqat generate runs/llmqat --prompt 'def read_lines(path):'
  llmqat generate runs/chat --chat --prompt 'How do I make crepes?'
"""
INSPECT = """\
The dry run: every linear layer, quantized or not and why, predicted size and memory. Takes the options of finetune.

  llmqat inspect --model llama --bits 4
  llmqat inspect --model ./my-model --group-size 64 --train lora
  llmqat inspect --machine
"""
RECIPES = """\
List the bundled recipes, or print one: YAML for --recipe, or a script to save and run.

  llmqat recipes
  llmqat recipes w4a8
  llmqat finetune --recipe w4a8
  llmqat recipes bert_classification > bert_classification.py
"""

EVAL_DATA_FIELDS = ("text_field", "rows", "streaming", "max_rows")


def build_parser() -> Parser:
    """All sub-commands with their flags."""
    parser = Parser(
        prog="llmqat",
        description="Fine-tune LLMs through their own integer grid, and ship exactly what was trained.",
        epilog="llmqat COMMAND --help explains each by example.",
    )
    parser.add_argument("--version", action="version", version=f"llmqat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> Parser:
        sub: Parser = commands.add_parser(name, help=text.split("\n")[0], description=text)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=COMMANDS[name])
        return sub

    for name, text, skip in (("finetune", FINETUNE, ()), ("quantize", QUANTIZE, ()), ("inspect", INSPECT, ("eval",))):
        sub = command(name, text)
        add_recipe_flags(sub, skip)
        if name != "inspect":
            sub.add_argument("--overwrite", action="store_true", help="write to an output directory that is not empty")
            sub.add_argument("--resume", action="store_true", help="go on from what was saved in --output")
        else:
            sub.add_argument("--machine", action="store_true", help="which kernels run here, and why not others")
        if name == "quantize":
            sub.add_argument(
                "--low-memory", action="store_true", help="block by block, for a model larger than memory; not measured"
            )

    sub = command("eval", EVAL)
    sub.add_argument("model", help="directory, Hub id, or llama")
    sub.add_argument("--against", metavar="MODEL", help="float model to compare with, token by token")
    add_scored_flags(sub)
    sub.add_argument("--throughput", action="store_true", help="also measure prefill and decode speed")
    add_activations_flag(sub)
    sub.add_argument("--json", metavar="FILE", help="also write the numbers to a file")

    sub = command("verify", VERIFY)
    sub.add_argument("model", help="packed directory")
    sub.add_argument("--no-logits", action="store_true", help="compare codes and scales only: less memory")

    sub = command("report", REPORT)
    sub.add_argument("model", help="directory of a finished run")

    sub = command("generate", GENERATE)
    sub.add_argument("model", help="directory, Hub id, or llama")
    sub.add_argument("--prompt", required=True, help="text to continue")
    sub.add_argument(
        "--chat", action="store_true", help="answer the prompt, by the chat template; print the answer only"
    )
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add (default: 64)")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: greedy (default)")
    add_activations_flag(sub)

    sub = command("recipes", RECIPES)
    sub.add_argument("name", nargs="?", help="recipe to print")
    return parser


def add_scored_flags(sub: Parser) -> None:
    """Flags of what `llmqat eval` scores."""
    sub.add_argument("--dataset", default="stdlib", help="as in finetune; its test split is scored (default: stdlib)")
    add_fields(sub, DataConfig, EVAL_DATA_FIELDS)
    sub.add_argument("--window", type=int, metavar="N", help="tokens per window (default: 512; named sets: 2048)")
    sub.add_argument("--eval-tokens", type=int, metavar="N", help="tokens at most (default: 65536; named sets: all)")
    sub.add_argument("--bos", choices=BOS_RULES, help="BOS rule (default: stream; named sets: tokenizer)")


def add_activations_flag(parser: argparse.ArgumentParser) -> None:
    """`--activations int8`."""
    parser.add_argument(
        "--activations",
        choices=("int8",),
        help="of a model packed without --act-bits: faster, but not what was trained; eval says how far from it",
    )


def run_finetune(args: argparse.Namespace, train: bool = True) -> None:
    """`llmqat finetune`."""
    from llmqat.pipeline import RECIPE, run

    saved = Path(args.resolved.output) / RECIPE
    if args.resume and not args.recipe and saved.exists():
        args.recipe = str(saved)
        args.resolved = recipe_from(args)
    run(args.resolved, train=train, resume=args.resume, overwrite=args.overwrite)


def run_quantize(args: argparse.Namespace) -> None:
    """`llmqat quantize`."""
    from llmqat.streaming import quantize_by_block

    if not args.low_memory:
        run_finetune(args, train=False)
        return
    if args.resume:
        raise LlmqatError("--low-memory keeps nothing to go on from: leave it out, or --resume")
    quantize_by_block(args.resolved, args.overwrite)


def run_inspect(args: argparse.Namespace) -> None:
    """`llmqat inspect`."""
    from llmqat.inspection import describe, inspect

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
        model = load_float(str(directory), dtype)[0]
    return model, load_tokenizer(str(directory))


def run_eval(args: argparse.Namespace) -> None:
    """`llmqat eval`."""
    import torch

    from llmqat.kernels.native import kernel_name
    from llmqat.machine import environment
    from llmqat.metrics.perplexity import evaluate
    from llmqat.metrics.throughput import throughput
    from llmqat.models.float_view import FloatCopy
    from llmqat.models.int8_activations import AsTrained
    from llmqat.run_data import eval_windows

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
    from llmqat.page.render import write_page

    print(write_page(args.model))


def run_generate(args: argparse.Namespace) -> None:
    """`llmqat generate`."""
    import torch

    from llmqat.train.chat import as_question

    model, tokenizer = load_any(args.model, None, args.activations)
    text = as_question(tokenizer, args.prompt) if args.chat else args.prompt
    encoded = tokenizer(text, add_special_tokens=not args.chat)
    ids = torch.tensor([encoded["input_ids"]], device=model.device)
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


def quiet_libraries() -> None:
    """Progress bars and advice of libraries drown our own."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    warnings.filterwarnings("ignore", module=r"(transformers|peft|accelerate|torch)\.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which peft imports
    import datasets
    import transformers

    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 1 failed, 2 wrong arguments."""
    args = build_parser().parse_args(argv)
    try:
        if hasattr(args, "recipe"):  # wrong values are found before anything heavy is imported
            args.resolved = recipe_from(args)
    except LlmqatError as error:
        print(f"llmqat {args.command}: {error}", file=sys.stderr)
        return 2
    try:
        if args.command != "recipes":
            quiet_libraries()
        args.run(args)
    except KeyboardInterrupt:
        advice = "; the same command with --resume goes on from there" if hasattr(args, "resume") else ""
        print(f"llmqat: interrupted{advice}", file=sys.stderr)
        return 1
    except Exception as error:
        if args.debug:
            raise
        known = isinstance(error, LlmqatError)
        text = " ".join(str(error).split())
        speaker = "" if is_first() else f"process {process_index()}: "
        advice = "" if known else f"unexpected {type(error).__name__}: "
        print(f"llmqat: {speaker}{advice}{text}{'' if known else '; --debug shows where'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
