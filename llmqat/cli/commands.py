"""The sub-commands of `llmqat`, a function each: `COMMANDS`."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llmqat.cli.flags import check_fields, recipe_from
from llmqat.cli.parser import EVAL_DATA_FIELDS, EVAL_OPEN
from llmqat.cli.recipes import bundled_recipes, bundled_scripts, command_of, find_recipe
from llmqat.config import DataConfig, EvalConfig, TrainConfig, speed_lengths
from llmqat.config.options import NO_LIMITS, check_value
from llmqat.errors import LlmqatError


def run_finetune(args: argparse.Namespace, train: bool = True) -> None:
    """Run `llmqat finetune`."""
    from llmqat.pipeline.output import saved_recipe
    from llmqat.pipeline.run import run

    with pushed(args.push_to_hub, args.parsed_recipe.output):
        if args.resume and not args.recipe:
            args.parsed_recipe = recipe_from(args, saved_recipe(Path(args.parsed_recipe.output)))
        run(args.parsed_recipe, train=train, resume=args.resume, overwrite=args.overwrite)


@contextmanager
def pushed(name: str | None, directory: str) -> Iterator[None]:
    """Upload `directory` to the Hub at the end of the ``with``, if a name is given, which is checked before it."""
    from llmqat.pipeline.push import check_name, push_to_hub
    from llmqat.processes import is_first

    if name is not None:
        check_name(name)
    yield
    if name is not None and is_first():
        print(push_to_hub(directory, name))


def run_quantize(args: argparse.Namespace) -> None:
    """Run `llmqat quantize`."""
    from llmqat.progress import log

    if args.recipe and args.parsed_recipe.train != TrainConfig():
        log(f"quantize does not train: the train section of {args.recipe} says nothing here")
    run_finetune(args, train=False)


def run_inspect(args: argparse.Namespace) -> None:
    """Run `llmqat inspect`."""
    from llmqat.report.plan import inspect

    if args.machine:
        return print_machine()
    print(inspect(args.parsed_recipe))


def print_machine() -> None:
    """Print the machine, as `inspect --machine` shows it."""
    import torch

    from llmqat.devices import devices_here
    from llmqat.kernels.gpu.available import explain as explain_gpu
    from llmqat.kernels.native import explain
    from llmqat.machine import environment
    from llmqat.nn.training_kernels import explain as explain_training
    from llmqat.serve.paths import native_path

    for key, value in environment().items():
        print(f"{key:>13}: {value or '-'}")
    print(f"{'kernels':>13}: {explain()}")
    print(f"{'training':>13}: {explain_training()}")
    print(f"{'native path':>13}: {native_path()}")
    for name in devices_here()[1:]:
        print(f"{name:>13}: {explain_gpu(torch.device(name))}")


def load_any(name: str, device: str, dtype: Any = None, activations: Any = None) -> tuple[Any, Any]:
    """A float or packed model on a device that was asked for, and its tokenizer."""
    from llmqat.devices import find_device
    from llmqat.formats.reader import is_packed, load_packed
    from llmqat.models.foreign import local_directory
    from llmqat.models.loading import load_float, load_tokenizer, resolve_name

    place = find_device(device)
    directory = local_directory(resolve_name(name))
    if is_packed(directory):
        model: Any = load_packed(directory, dtype, place, activations)
    elif activations:
        raise LlmqatError(f"--activations {activations} is for packed models; {name} is a float model")
    else:
        model = load_float(str(directory), dtype)
        model.to(place)
    return model, load_tokenizer(str(directory))


def context_of(model: Any) -> int | None:
    """Tokens that a model can see; None if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def run_eval(args: argparse.Namespace) -> None:
    """Run `llmqat eval`."""
    import torch

    from llmqat.machine import environment
    from llmqat.models.architectures import needed_bos
    from llmqat.nn.context import check_context, position_limit
    from llmqat.pipeline.inputs import eval_windows

    check_fields(DataConfig, vars(args))
    check_fields(EvalConfig, vars(args))
    check_task_flags(args)
    if args.tasks:
        return _run_tasks(args)
    model, tokenizer = load_any(args.model, args.device, torch.float32, args.activations)
    source = DataConfig(**{name: getattr(args, name) for name in EVAL_DATA_FIELDS})
    bos = args.bos or needed_bos(model)
    data = eval_windows(source, tokenizer, context_of(model), args.window, args.tokens, bos)
    check_context(position_limit(model), data.ids.shape[-1])
    numbers = perplexity_numbers(args, model, data)
    if args.throughput:
        numbers |= speed_numbers(args, context_of(model))
    for key, value in numbers.items():
        if value is not None:
            print(f"{key:<16} {value:.6g}" if isinstance(value, float) else f"{key:<16} {value}")
    if args.json:
        write_text(Path(args.json), json.dumps({**numbers, "environment": environment()}, indent=2) + "\n")


TASK_FLAGS = {"task_path": None, "few_shot": 0, "limit": 1, "batch_size": 1, "chat": None}  # -> the least number


def check_task_flags(args: argparse.Namespace) -> None:
    """Refuse flags of `llmqat eval` that say nothing, or that no task can follow.

    Raises:
        LlmqatError: naming the flag.
    """
    given = [name for name in TASK_FLAGS if getattr(args, name) is not None and getattr(args, name) is not False]
    if not args.tasks:
        lone = given if args.tasks is None else ["tasks"]
        if lone:
            flag = lone[0].replace("_", "-")
            raise LlmqatError(f"--{flag} says nothing without names in --tasks; add those, or leave it out")
        return
    for name, least in TASK_FLAGS.items():
        if least is not None and name in given:
            check_value(int, getattr(args, name), f"--{name.replace('_', '-')}", {**NO_LIMITS, "least": least})
    flags = {f.name: f.metadata.get("flag") for section in (DataConfig, EvalConfig) for f in fields(section)}
    defaults = {name: getattr(DataConfig, name) for name in EVAL_DATA_FIELDS} | dict.fromkeys(EVAL_OPEN)
    texts = [flags[name] for name, default in defaults.items() if getattr(args, name) != default]
    texts += ["--throughput"] if args.throughput else []
    if texts:
        raise LlmqatError(f"{texts[0]} says nothing with --tasks, which bring their own texts; leave one of them out")


def _run_tasks(args: argparse.Namespace) -> None:
    """Run `llmqat eval --tasks`."""
    import torch

    from llmqat.metrics.harness.tasks import Tasks, as_json, scores, table

    tasks = Tasks(
        tuple(args.tasks.split(",")), args.task_path, args.few_shot, args.limit, args.batch_size or 1, args.chat
    )
    manager = tasks.manager()
    results = tasks.run(*load_any(args.model, args.device, torch.float32, args.activations), manager)
    against = tasks.run(*load_any(args.against, args.device, torch.float32), manager) if args.against else None
    rows = scores(results, against)
    print(table(rows))
    if args.json:
        said = {"model": args.model, "against": args.against, **asdict(tasks), **as_json(rows, results)}
        write_text(Path(args.json), json.dumps(said, indent=2) + "\n")


def perplexity_numbers(args: argparse.Namespace, model: Any, data: Any) -> dict[str, Any]:
    """Perplexity of a model on windows, how they were cut, and how far it is from what it is compared with."""
    import torch

    from llmqat.kernels.native import kernel_name
    from llmqat.metrics.perplexity import evaluate
    from llmqat.models.float_view import FloatCopy
    from llmqat.serve.activations import AsTrained

    reference = FloatCopy(load_any(args.against, args.device, torch.float32)[0]) if args.against else None
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
        "kernel": kernel_name(model.device),
    }
    if args.activations:
        trained = evaluate(model, data, AsTrained(model))
        numbers |= {"activations": f"{args.activations}, not as trained", "kl_to_trained": trained.kl_to_float}
        numbers |= {"top1_to_trained": trained.top1_agreement}
    return numbers


def speed_numbers(args: argparse.Namespace, context: int | None) -> dict[str, Any]:
    """Speed, and path, of a model loaded anew, in its stored dtype."""
    from llmqat.metrics.throughput import throughput

    prompt, new_tokens = speed_lengths(EvalConfig.prompt, EvalConfig.new_tokens, context)
    speed = throughput(
        load_any(args.model, args.device, None, args.activations)[0], prompt, new_tokens, EvalConfig.repeats
    )
    path = speed.paths.summary() if speed.paths else None
    return {"prefill_tok_s": speed.prefill_tok_s, "decode_tok_s": speed.decode_tok_s, "path": path}


def write_text(path: Path, text: str) -> None:
    """Write a file that a flag names.

    Raises:
        LlmqatError: if it cannot be written.
    """
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise LlmqatError(f"cannot write {path}: {error.strerror}; choose another file") from error


def run_verify(args: argparse.Namespace) -> None:
    """Run `llmqat verify`.

    Raises:
        LlmqatError: if the model is not what was trained, or a flag says nothing without another.
    """
    lone = [flag for flag in ("text", "runtime_python") if getattr(args, flag) and not args.runtime]
    if lone:
        raise LlmqatError(f"--{lone[0].replace('_', '-')} says nothing without --runtime; add that, or leave it out")
    if args.against or args.runtime:
        return verify_elsewhere(args)
    if args.json:
        raise LlmqatError("--json writes what --against or --runtime find; add one of them, or leave it out")
    from llmqat.devices import find_device
    from llmqat.formats.verify import verify

    check = verify(args.model, logits=not args.no_logits, device=find_device(args.device))
    print(
        f"layers           {check.layers}\ncodes equal      {check.codes_equal}\n"
        f"scales equal     {check.scales_equal}\nfiles equal      {not check.changed}"
    )
    if check.max_logit_error is not None:
        print(f"max logit error  {check.max_logit_error:.3e}\nbound            {check.bound:.3e}")
    if check.decode_error is not None:
        print(
            f"decode error     {check.decode_error:.3e}\ndecode bound     {check.decode_bound:.3e}\n"
            f"greedy equal     {check.greedy_equal}"
        )
    if not check.ok:
        differs = [*check.mismatched, *check.changed]
        where = f": {', '.join(differs[:5])}" if differs else " in its logits or what it decodes"
        raise LlmqatError(f"{args.model} is not what was trained{where}; copy it again, or write it again")


def verify_elsewhere(args: argparse.Namespace) -> None:
    """Run `llmqat verify --against` and `--runtime`.

    Raises:
        LlmqatError: if the exported model is not the packed one, or the engine makes another of it.
    """
    from llmqat.pipeline.verify_export import verify_export
    from llmqat.pipeline.verify_runtime import verify_runtime

    outcome: dict[str, Any] = {}
    wrong = []
    if args.against:
        check = verify_export(args.model, args.against)
        print(
            f"format           {check.format}\nlayers decoded   {check.layers}\nother tensors    {check.tensors}\n"
            f"rounded          {check.rounded}\nall equal        {check.ok}"
        )
        outcome |= {**asdict(check), "ok": check.ok}
        wrong += [f"it {line}" for line in check.differences]
    if args.runtime:
        python = {"python": args.runtime_python} if args.runtime_python else {}
        ran = verify_runtime(args.model, args.against or args.model, args.runtime, args.text, **python)
        print(ran)
        outcome |= {"runtime": {**asdict(ran), "ok": ran.ok}, "ok": ran.ok and not wrong}
        wrong += ran.problems()
    if args.json:
        write_text(Path(args.json), json.dumps(outcome, indent=2) + "\n")
    if wrong:
        raise LlmqatError(f"{args.model} is not {args.against or args.model}: {'; '.join(wrong)}; export that again")


def run_export(args: argparse.Namespace) -> None:
    """Run `llmqat export`."""
    from llmqat.pipeline.export import export

    with pushed(args.push_to_hub, args.output):
        print(export(args.model, args.to, args.output, args.allow_rounding))


def run_import(args: argparse.Namespace) -> None:
    """Run `llmqat import`."""
    from llmqat.pipeline.import_checkpoint import import_checkpoint

    print(import_checkpoint(args.model, args.output))


def run_report(args: argparse.Namespace) -> None:
    """Run `llmqat report`."""
    from llmqat.report.page.render import write_page

    print(write_page(args.model))


def run_generate(args: argparse.Namespace) -> None:
    """Run `llmqat generate`."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    from llmqat.data.template import as_question
    from llmqat.nn.context import check_sequence

    check_sampling(args)
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    model, tokenizer = load_any(args.model, args.device, dtype, args.activations)
    texts = [as_question(tokenizer, prompt) if args.chat else prompt for prompt in args.prompt]
    prompts = [torch.tensor(tokenizer(text, add_special_tokens=not args.chat)["input_ids"]) for text in texts]
    if not all(map(len, prompts)):
        raise LlmqatError("the prompt gives no token, and this tokenizer adds none; give a longer --prompt")
    ids = pad_sequence(prompts, batch_first=True, padding_side="left").long()
    mask = pad_sequence([torch.ones_like(prompt) for prompt in prompts], batch_first=True, padding_side="left")
    check_sequence(model, ids, args.max_new_tokens - 1)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature > 0 else {"do_sample": False}
    output = model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=args.max_new_tokens,
        pad_token_id=0 if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
        **sampling,
    )
    for index, (row, kept) in enumerate(zip(output, mask, strict=True)):
        if len(texts) > 1:
            print(f"--- {index + 1} of {len(texts)}")
        begin = len(kept) if args.chat else len(kept) - int(kept.sum())
        print(tokenizer.decode(row[begin:], skip_special_tokens=True))


def check_sampling(args: argparse.Namespace) -> None:
    """Refuse flags of `llmqat generate` that no model can follow.

    Raises:
        LlmqatError: naming the flag, its value and its limit.
    """
    for prompt in args.prompt:
        check_value(str, prompt, "--prompt", {**NO_LIMITS, "free": True})
    check_value(int, args.max_new_tokens, "--max-new-tokens", {**NO_LIMITS, "least": 1})
    check_value(float, args.temperature, "--temperature", {**NO_LIMITS, "least": 0, "most": 100})


def run_recipes(args: argparse.Namespace) -> None:
    """Run `llmqat recipes`."""
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
    "export": run_export,
    "import": run_import,
    "report": run_report,
    "generate": run_generate,
    "inspect": run_inspect,
    "recipes": run_recipes,
}
