"""The parser of the command line: every sub-command, its help by example, and its flags."""

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import llmqat
from llmqat.cli.flags import Parser, add_fields, add_recipe_flags
from llmqat.config import DEFAULT_BOS, DataConfig, EvalConfig, Recipe
from llmqat.formats.export.holds import HOLDS
from llmqat.pipeline.engines.table import ENGINES
from llmqat.version import __version__

FINETUNE = """\
Fine-tune a model with quantized weights in its forward, pack it, and prove and measure the packed file.

  llmqat finetune --model llama --bits 4
      the small Llama inside this package, on the source text of Python's standard library: no network needed
  llmqat finetune --model meta-llama/Llama-3.2-1B --dataset wikitext:wikitext-2-raw-v1 --bits 4 --output out
  llmqat finetune --model ./my-model --dataset my.jsonl --bits 4 --train lora --output out
  llmqat finetune --model ./my-model --dataset chats.jsonl --bits 4 --output out
      conversations (messages, prompt/completion, instruction/output): chat template, loss on the answers only
  llmqat finetune --model ./my-model --dataset my.txt --bits 4 --act-bits 8 --smooth auto --output out
  llmqat finetune --model ./large-model --dataset my.txt --bits 4 --low-memory --output out
      LoRA with one block of the model in memory at a time, forward and backward
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
      one block of the model in memory at a time, from files; takes the disk one to two bytes for each weight
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
  llmqat eval runs/llmqat --tasks arc_easy,hellaswag --against llama
      tasks of lm-evaluation-harness instead of a text; needs llmqat[lm-eval]
"""
VERIFY = """\
Prove that a packed directory holds the codes and scales of training, bit for bit, and runs as what was trained.

  llmqat verify runs/llmqat
  llmqat verify out-gguf --against runs/llmqat
      an exported model: codes, scales and zero points, decoded, and all beside them, compared with the packed directory
  llmqat verify out-gguf --against runs/llmqat --runtime llama.cpp --runtime-python llama-env/bin/python
      and run in its engine: log-probabilities of a text, and greedy tokens, beside those of the packed directory
  llmqat verify runs/llmqat --runtime vllm
      the packed directory itself, in another engine
"""
EXPORT = """\
Move a packed model to the format of another engine: the same codes and scales, bit for bit; nothing is quantized again.

  llmqat export runs/llmqat --to dense --output out-dense
      the dequantized model, an ordinary float checkpoint
  llmqat export runs/llmqat --to gguf --output out-gguf
      one file for llama.cpp, out-gguf/model.gguf; for grids in groups of 32 and multiples
  llmqat export runs/llmqat --to gptq --output out-gptq
      a checkpoint for vLLM, SGLang and GPTQModel; so is awq; mlx is one for Apple silicon
  llmqat export runs/llmqat --to onnx --output out-onnx
      a graph for ONNX Runtime and OpenVINO; needs llmqat[onnx]

What a format cannot hold without loss is refused, with the nearest grid to train instead. Where it only rounds scales
or zero points, --allow-rounding goes on, and says how much was lost.
"""
IMPORT = """\
Make a packed directory of a quantized checkpoint of another tool: its codes and scales, bit for bit.

  llmqat import ./llama-gptq --output out
      GPTQ and AWQ (gemm), from a directory or the Hub
  llmqat import llama-q4_0.gguf --output out
      layers in blocks of Q4_0, Q5_0 and Q8_0; blocks of other types become float

The directory then runs, exports and verifies as any that llmqat trained.
"""
REPORT = """\
Write report.html of a finished run again, from its report.json and details.json: one page that needs nothing else.

  llmqat report runs/llmqat
"""
GENERATE = """\
Continue a text with a float or packed model.

  llmqat generate runs/llmqat --prompt 'def read_lines(path):'
  llmqat generate runs/chat --chat --prompt 'How do I make crepes?'
  llmqat generate runs/llmqat --prompt 'import os' --prompt 'import sys'
      decoded together, the weights read once a step
  llmqat generate runs/llmqat --prompt 'import os' --dtype float32
      logits that are rounded to bfloat16 are often equal, and the kernels then decide; in float32 they do not
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

# What a model computes in: auto is the dtype of its file.
DTYPES = ("auto", "float32", "bfloat16", "float16")
EVAL_DATA_FIELDS = ("dataset", "text_field", "rows", "streaming", "max_rows")
# What `llmqat eval` leaves to the dataset -> the choice.
EVAL_OPEN = {
    "window": f"{EvalConfig.window}; named sets: 2048",
    "tokens": f"{EvalConfig.tokens}; named sets: all",
    "bos": f"{DEFAULT_BOS}; named sets: tokenizer; Gemma: window",
}
PUSH = "then upload the directory to the Hub as owner/model, private if it is new"
NO_TRAINING = "quantize does not train; llmqat finetune does"
# Recipe fields that a command cannot honour -> why.
REFUSED = {
    "finetune": {},
    "quantize": dict.fromkeys(("train", "quant.clip_mask", "eval.validation_tokens", "eval.control"), NO_TRAINING),
    "inspect": {"eval": "inspect measures nothing"},
}


def build_parser(commands: Mapping[str, Callable[[Any], None]]) -> Parser:
    """All sub-commands with their flags; `commands` holds the function that runs each."""
    parser = Parser(
        prog="llmqat",
        description=llmqat.__doc__,
        epilog="llmqat COMMAND --help explains each by example.",
    )
    parser.add_argument("--version", action="version", version=f"llmqat {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> Parser:
        sub: Parser = subparsers.add_parser(name, help=text.split("\n")[0], description=text)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        sub.set_defaults(run=commands[name])
        return sub

    for name, text in (("finetune", FINETUNE), ("quantize", QUANTIZE), ("inspect", INSPECT)):
        sub = command(name, text)
        add_recipe_flags(sub, REFUSED[name])
        if name == "inspect":
            sub.add_argument("--machine", action="store_true", help="which kernels run here, and why not others")
            continue
        sub.add_argument("--overwrite", action="store_true", help="write to an output directory that is not empty")
        sub.add_argument("--resume", action="store_true", help="go on from what was saved in --output")
        sub.add_argument("--push-to-hub", metavar="NAME", help=PUSH)

    sub = command("eval", EVAL)
    sub.add_argument("model", help="directory, Hub id, GGUF file, llama or smollm2")
    sub.add_argument("--against", metavar="MODEL", help="float model to compare with, token by token")
    add_fields(sub, DataConfig, EVAL_DATA_FIELDS)
    add_fields(sub, EvalConfig, tuple(EVAL_OPEN), EVAL_OPEN)
    sub.add_argument("--throughput", action="store_true", help="also measure prefill and decode speed")
    add_running_flags(sub)
    sub.add_argument("--json", metavar="FILE", help="also write the numbers to a file")
    add_task_flags(sub.add_argument_group("tasks of lm-evaluation-harness, instead of a text"))

    add_other_commands(command)
    return parser


def add_task_flags(group: Any) -> None:
    """Add the flags of `llmqat eval --tasks`."""
    group.add_argument("--tasks", metavar="TASK[,TASK]", help="names of tasks, or of groups of them")
    group.add_argument("--task-path", metavar="DIR", help="folder of task files of your own, beside the harness' own")
    group.add_argument("--few-shot", type=int, metavar="N", help="examples before each question; default: the task's")
    group.add_argument("--limit", type=int, metavar="N", help="documents of each task at most")
    group.add_argument("--batch-size", type=int, metavar="N", help="requests at a time (default: 1)")
    group.add_argument("--chat", action="store_true", help="ask through the chat template")


def add_other_commands(command: Callable[[str, str], Parser]) -> None:
    """Add the sub-commands that take no recipe, made by ``command(name, help)``."""
    sub = command("verify", VERIFY)
    sub.add_argument("model", help="packed directory, or the output of llmqat export")
    sub.add_argument("--no-logits", action="store_true", help="compare codes and scales only: less memory")
    sub.add_argument("--against", metavar="DIR", help="packed directory that the model, an export, was made of")
    sub.add_argument("--runtime", choices=tuple(ENGINES), help="also run the model in this engine")
    sub.add_argument("--runtime-python", metavar="FILE", help="Python of the environment that has the engine")
    sub.add_argument(
        "--text", metavar="FILE", help="with --runtime: text to compare on, instead of a short one of ours"
    )
    sub.add_argument("--json", metavar="FILE", help="with these: also write the outcome to a file")
    add_fields(sub, Recipe, ("device",))

    sub = command("export", EXPORT)
    sub.add_argument("model", help="packed directory")
    sub.add_argument("--to", required=True, choices=tuple(HOLDS), help="format")
    sub.add_argument("--output", required=True, metavar="TEXT", help="directory to write; new or empty")
    sub.add_argument(
        "--allow-rounding",
        action="store_true",
        help="go on where the format rounds scales or zero points of the grid; the loss is measured and said",
    )
    sub.add_argument("--push-to-hub", metavar="NAME", help=PUSH)

    sub = command("import", IMPORT)
    sub.add_argument("model", help="directory or Hub id of a checkpoint, or a GGUF file")
    sub.add_argument("--output", required=True, metavar="TEXT", help="directory to write; new or empty")

    sub = command("report", REPORT)
    sub.add_argument("model", help="directory of a finished run")

    sub = command("generate", GENERATE)
    sub.add_argument("model", help="directory, Hub id, GGUF file, llama or smollm2")
    sub.add_argument(
        "--prompt", required=True, action="append", help="text to continue; several, each behind its flag, run together"
    )
    sub.add_argument(
        "--chat", action="store_true", help="answer the prompt, by the chat template; print the answer only"
    )
    sub.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="tokens to add (default: 64)")
    sub.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: greedy (default)")
    sub.add_argument("--dtype", choices=DTYPES, default="auto", help="to compute in; auto: as stored (default)")
    add_running_flags(sub)

    sub = command("recipes", RECIPES)
    sub.add_argument("name", nargs="?", help="recipe to print")


def add_running_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a model that runs: `--device`, and `--activations int8`."""
    add_fields(parser, Recipe, ("device",))
    parser.add_argument(
        "--activations",
        choices=("int8",),
        help="run a weight-only packed model with int8 activations: faster, but not the arithmetic it was trained "
        "with; llmqat eval reports the difference",
    )
