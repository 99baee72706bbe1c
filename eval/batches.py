"""Tokens per second of several sequences at once: llmqat and vLLM on one packed directory, by turns.

    python eval/batches.py --model out --vllm-python vllm-env/bin/python

Both compute in bfloat16, greedily, on prompts of equal length and without an end token. A rate is that of decoding: the
time of a call less that of a call for one token. vLLM keeps the defaults of its CPU build.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from _results import write

Call = Callable[[int, int], Any]


def llmqat_calls(args: argparse.Namespace) -> tuple[str, Call]:
    """Version of llmqat, and a call for a batch and so many new tokens."""
    import torch

    import llmqat

    torch.set_num_threads(args.threads)
    model = llmqat.load(args.model, dtype=torch.bfloat16)
    vocabulary = model.config.get_text_config().vocab_size

    def call(batch: int, new: int) -> Any:
        ids = torch.randint(10, vocabulary, (batch, args.prompt), generator=torch.Generator().manual_seed(batch))
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **options)

    return llmqat.__version__, call


def vllm_calls(args: argparse.Namespace) -> tuple[str, Call]:
    """Version of vLLM, and a call for a batch and so many new tokens."""
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[: args.threads])
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores}
    import vllm

    model = vllm.LLM(
        args.model, dtype="bfloat16", max_model_len=args.prompt + args.new + 8, enable_prefix_caching=False
    )
    vocabulary = model.llm_engine.model_config.get_vocab_size()

    def call(batch: int, new: int) -> Any:
        rows = [range(row * args.prompt, (row + 1) * args.prompt) for row in range(batch)]
        prompts = [{"prompt_token_ids": [10 + 7919 * i % (vocabulary - 10) for i in row]} for row in rows]
        sampling = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        return model.generate(prompts, sampling, use_tqdm=False)

    return str(vllm.__version__), call


WORKERS = {"llmqat": llmqat_calls, "vllm": vllm_calls}


def work(args: argparse.Namespace) -> None:
    """Answer each line ``[batch, new tokens]`` by the seconds of that call; the first line is the version."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints
    version, call = WORKERS[args.worker](args)
    print(json.dumps(version), file=replies, flush=True)
    for line in sys.stdin:
        started = time.perf_counter()
        call(*json.loads(line))
        print(json.dumps(time.perf_counter() - started), file=replies, flush=True)


@contextmanager
def worker(name: str, python: str, args: argparse.Namespace) -> Iterator[tuple[str, Callable[[int, int], float]]]:
    """Version of an engine in a process of its own, and the seconds of a call."""
    flags = [f"--{key}={getattr(args, key)}" for key in ("model", "threads", "prompt", "new")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    if python != sys.executable:  # other environments are not to see the packages of this one
        environment.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        [python, __file__, "--worker", name, *flags],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    ask, answers = process.stdin, process.stdout

    def seconds(batch: int, new: int) -> float:
        ask.write(json.dumps([batch, new]) + "\n")
        ask.flush()
        return float(json.loads(answers.readline()))

    try:
        yield str(json.loads(answers.readline())), seconds
    finally:
        ask.close()
        process.wait()


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="packed directory")
    parser.add_argument("--vllm-python", help="interpreter with vLLM; none: llmqat alone")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens generated for each")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("eval/results/batches.json"))
    parser.add_argument("--worker", choices=WORKERS, help=argparse.SUPPRESS)
    return parser.parse_args()


def measured(engines: dict[str, Callable[[int, int], float]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each engine and batch: the rates of all rounds, which take the engines by turns."""
    rows = []
    for batch in args.batches:
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for taken in range(args.repeats + 1):  # the first one warms up
            for name, seconds in engines.items():
                first, whole = seconds(batch, 1), seconds(batch, args.new)
                if taken:
                    rates[name].append(batch * (args.new - 1) / (whole - first))
        for name, found in rates.items():
            rows.append({"engine": name, "batch": batch, "tokens_per_second": found})
            low, high = min(found), max(found)
            print(
                f"{name:8} {batch:3} sequences {statistics.median(found):8.1f} tokens/s [{low:.1f}, {high:.1f}]",
                flush=True,
            )
    return rows


def main() -> None:
    """Measure, print and write."""
    args = arguments()
    if args.worker:
        return work(args)
    import llmqat

    pythons = {"llmqat": sys.executable} | ({"vllm": args.vllm_python} if args.vllm_python else {})
    settings = {key: getattr(args, key) for key in ("batches", "prompt", "new", "threads", "repeats")}
    with ExitStack() as stack:
        started = {name: stack.enter_context(worker(name, python, args)) for name, python in pythons.items()}
        versions = {name: version for name, (version, _) in started.items()}
        rows = measured({name: seconds for name, (_, seconds) in started.items()}, args)
    header = {
        "model": Path(args.model).name,
        "settings": settings,
        "versions": versions,
        "environment": llmqat.environment(),
    }
    write(args.output, {**header, "rows": rows})


if __name__ == "__main__":
    main()
