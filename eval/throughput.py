"""llmqat's packed models against other ways to run 4-bit and dense models on a CPU, side by side.

    python eval/throughput.py --install-peers                # everything; makes environments of peers first
    python eval/throughput.py --ops --shapes 1b              # single layers of a 1 B model
    python eval/throughput.py --models --peers llmqat-a8 llama.cpp-q4_0
    python eval/throughput.py --contention                   # decoding beside a busy process
    python eval/throughput.py --quick                        # tiny shapes: does every peer run?

Every peer runs in a process of its own and sleeps while another is measured; rounds alternate over the peers. A sample
is taken again if others took more than --foreign of the machine during it. Weights are random. Tables and the ratios to
the targets go to the terminal, all samples to --output, and the roofline (GB/s against M) beside it. A peer that is not
installed is reported as absent. GPTQModel and llama.cpp need environments under --peer-envs, which --install-peers
makes: llama.cpp is compiled for minutes.
"""

import argparse
import dataclasses
import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _peers import environments, plot, report
from _peers.bench import QUICK, Bench, Settings
from _peers.catalog import A8, A16, PEERS, Q4_0, READ
from _peers.client import Client
from _peers.sections import measure_contention, measure_layers, measure_models
from _peers.shapes import GROUP_SIZE, LAYERS, MODELS

import llmqat

SECTIONS = ("ops", "models", "contention")
CONTENTION_PEERS = (A16, A8, Q4_0)
TINY = "tiny"


def arguments() -> argparse.Namespace:
    """The command line."""
    layer_sets, model_shapes = ([name for name in shapes if name != TINY] for shapes in (LAYERS, MODELS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ops", action="store_true", help="single layers, M = 1 to 512")
    parser.add_argument("--models", action="store_true", help="prefill and decode of whole models")
    parser.add_argument("--contention", action="store_true", help="decode beside a busy process (default: all three)")
    parser.add_argument("--shapes", nargs="+", choices=[*layer_sets, *model_shapes, TINY], help="default: all but tiny")
    parser.add_argument("--peers", nargs="+", choices=list(PEERS), default=list(PEERS), help="default: all")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every peer")
    parser.add_argument("--repeats", type=int, help="rounds (default: 7)")
    parser.add_argument("--prompts", type=int, nargs="+", help="prompt lengths of prefills (default: 128 512 2000)")
    parser.add_argument("--foreign", type=float, default=0.06, help="greatest foreign share of the machine in a sample")
    parser.add_argument("--patience", type=float, default=10.0, help="seconds to wait for quiet before each retake")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds: the figures mean nothing")
    parser.add_argument("--install-peers", action="store_true", help="make the environments of chosen peers first")
    parser.add_argument("--peer-envs", type=Path, default=Path("runs/peers"), help="environments of peers")
    parser.add_argument("--runs", type=Path, default=Path("runs/throughput"), help="model files and logs of workers")
    parser.add_argument("--output", type=Path, default=Path("eval/results/throughput.json"))
    args = parser.parse_args()
    args.sections = [name for name in SECTIONS if getattr(args, name)] or list(SECTIONS)
    shapes = args.shapes or ([TINY] if args.quick else [*layer_sets, *model_shapes])
    args.layer_sets = {name: LAYERS[name] for name in shapes if name in LAYERS}
    args.model_shapes = [name for name in shapes if name in MODELS]
    if args.repeats is not None and args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    return args


def progress(line: str) -> None:
    """A line of the log, with the time."""
    print(time.strftime("%H:%M:%S"), line, flush=True)


def run_section(name: str, bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """Measure one section: rows, and ratios to targets."""
    rows: list[report.Row]
    if name == "ops":
        rows = measure_layers(bench, args.peers, args.layer_sets)
        return {"rows": rows, "targets": report.layer_verdicts(rows)}
    if name == "models":
        rows = measure_models(bench, args.peers, args.model_shapes)
        return {"rows": rows, "targets": report.model_verdicts(rows)}
    peers = [peer for peer in CONTENTION_PEERS if peer in args.peers]
    rows = [row for shape in args.model_shapes for row in measure_contention(bench, peers, shape)]
    return {"rows": rows, "targets": report.contention_verdicts(rows)}


TABLES: dict[str, Callable[[list[report.Row]], list[str]]] = {
    "ops": lambda rows: list(report.layer_tables(rows)),
    "models": lambda rows: [report.model_table(rows)],
    "contention": lambda rows: [report.contention_table(rows)],
}


def show(name: str, section: dict[str, Any], limit: float) -> None:
    """Print tables, targets, what is absent or failed, and what was disturbed."""
    rows = section["rows"]
    print(f"\n{name}: {section['threads']} threads, {section['settings']['repeats']} rounds, median ± half the range\n")
    print("\n\n".join(TABLES[name](rows)))
    for peer, why in section["absent"].items():
        print(f"absent: {peer}: {why}")
    for row in rows:
        if "failed" in row:
            where = " ".join(str(row[key]) for key in ("model", "set", "layer") if key in row)
            print(f"failed: {row['peer']} on {where}: {row['failed']}")
    for line in report.disturbed(rows, limit):
        print(f"disturbed: {line}")
    if section["targets"]:
        print(f"\nratios, round by round: median [range]\n{report.target_table(section['targets'])}")


def write(output: Path, name: str, section: dict[str, Any]) -> None:
    """Put a section into the results; sections of earlier runs stay, each with its own machine and date."""
    results = json.loads(output.read_text()) if output.exists() else {}
    results[name] = section
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")


def measured(name: str, bench: Bench, args: argparse.Namespace) -> dict[str, Any]:
    """A section of the results, with what it was measured on and how."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "environment": {"llmqat": llmqat.__version__, **llmqat.environment()},
        "threads": args.threads,
        "group_size": GROUP_SIZE,
        "settings": {**dataclasses.asdict(bench.settings), "foreign_limit": args.foreign},
        "models": {shape: dataclasses.asdict(MODELS[shape]) for shape in args.model_shapes},
        **run_section(name, bench, args),
        "peers": bench.about,
        "absent": bench.absent,
    }


def draw(section: dict[str, Any], path: Path) -> None:
    """The roofline of the layers that were measured."""
    machine = f"{section['environment']['cpu']}, {section['threads']} threads"
    title = f"{machine}, 4 bits, group {GROUP_SIZE}, median and range of {section['settings']['repeats']} rounds"
    plot.roofline(section["rows"], path, title)


def main() -> None:
    """Measure, print, write the JSON after every section, draw."""
    args = arguments()
    torch.set_num_threads(args.threads)  # for the record: this process computes nothing
    if args.install_peers:
        for environment in dict.fromkeys(PEERS[peer].environment for peer in args.peers):
            if environment is not None:
                environments.install(environment, args.peer_envs)
    settings = QUICK if args.quick else Settings()
    given = {"repeats": args.repeats, "prompts": args.prompts and tuple(args.prompts)}
    settings = dataclasses.replace(settings, **{name: value for name, value in given.items() if value})
    peers = args.peers if READ in args.peers else [READ, *args.peers]
    args.peers = [name for name in PEERS if name in peers]
    start = functools.partial(Client, threads=args.threads, runs=args.runs, environments_at=args.peer_envs)
    with Bench(settings, start, args.foreign, args.patience, progress) as bench:
        for name in args.sections:
            section = measured(name, bench, args)
            write(args.output, name, section)
            show(name, section, args.foreign)
            if any("weight_gb_s" in row for row in section["rows"]):
                draw(section, args.output.with_suffix(".svg"))


if __name__ == "__main__":
    main()
