"""Every format in every engine that runs it, beside the packed model: the table of docs/serve.md.

    python eval/engines.py --install                     # the bundled model; makes environments of engines first
    python eval/engines.py --models llama smollm2 --grids 4-bits-g32
    python eval/engines.py --write-docs                  # the table again, from what was measured

A cell is a model, a grid, a format and an engine: the float model rounded to nearest on the grid, packed, exported, and
compared by the command that the cell names. What a format or an engine refuses is a result, too. Every cell is written
when it is done, so that a sweep goes on where it stopped; `--again ENGINE` measures those of an engine once more.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from _peers import environments
from _results import begun, write

import llmqat
from llmqat import QuantScheme

EVAL = Path(__file__).resolve().parent
PACKED = "packed"
GRIDS = {
    "4-bits-g32": QuantScheme(4, 32),
    "4-bits-g128-asym": QuantScheme(4, 128, symmetric=False),
    "8-bits-g64": QuantScheme(8, 64),
}
# Format -> engines that may run it.
ENGINES = {
    PACKED: ("llmqat", "transformers", "vllm"),
    "dense": ("transformers", "vllm"),
    "gguf": ("llama.cpp", "transformers"),
    "gptq": ("gptqmodel", "transformers", "vllm"),
    "awq": ("gptqmodel", "transformers", "vllm"),
    "mlx": ("mlx",),
    "onnx": ("onnxruntime", "openvino"),
}
# Engine -> the folder of its environment; transformers runs GPTQ and AWQ checkpoints by GPTQModel.
HOMES = {
    **{"vllm": "vllm", "llama.cpp": "llama-cpp", "gptqmodel": "gptqmodel", "mlx": "mlx"},
    **{"onnxruntime": "onnx", "openvino": "onnx"},
}
BY_GPTQMODEL = ("gptq", "awq")
WEIGHTS = ".safetensors", ".gguf", ".data"  # files that hold them
# In a line of llmqat that says that an environment lacks something.
NOT_INSTALLED = ("needs packages that", "ModuleNotFoundError", "ImportError")
BEGIN, END = "<!-- engines: begin -->\n", "<!-- engines: end -->"
HEAD = (
    "| format | engine | model | grid | weights | tokens equal | max error | KL (bound) | top-1 | MB | tokens/s |\n"
    "|---|---|---|---|---|---:|---:|---:|---:|---:|---:|\n"
)


class Cell(NamedTuple):
    """One comparison.

    Attributes:
        model: as `--models` names it.
        grid: key of `GRIDS`.
        format: packed, or one of `llmqat export`.
        engine: that runs it.
    """

    model: str
    grid: str
    format: str
    engine: str

    @property
    def key(self) -> str:
        """Its name in the results, which names no folder of this machine."""
        return " ".join((Path(self.model).name, *self[1:]))

    @property
    def home(self) -> str | None:
        """The folder of the environment that it runs in; None for that of llmqat."""
        return "gptqmodel" if self.format in BY_GPTQMODEL and self.engine == "transformers" else HOMES.get(self.engine)


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """The comparisons that were asked for; a dense model is a float model like any other, whatever its grid was."""
    for model in args.models:
        for index, grid in enumerate(args.grids):
            for format, engines in ENGINES.items():
                if format != "dense" or index == 0:
                    yield from (Cell(model, grid, format, name) for name in engines if name in args.engines)


def packed_model(model: str, grid: str, directory: Path) -> Path:
    """The packed directory of a model, rounded to nearest; made first where needed."""
    if not (directory / "config.json").exists():
        float_model = llmqat.load_float(model)
        llmqat.prepare(float_model, GRIDS[grid])
        llmqat.pack(float_model, directory, llmqat.load_tokenizer(model))
    return directory


def compared(cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """The outcome of a cell, or the line in which it was refused."""
    folder = args.scratch / f"{Path(cell.model).name}-{cell.grid}"
    packed = packed_model(cell.model, cell.grid, folder / PACKED)
    output = folder / cell.format
    try:
        if cell.format != PACKED and not output.exists():
            llmqat.export(packed, cell.format, output)
    except llmqat.LlmqatError as error:
        return {"refused": str(error)}
    python = environments.python_of(cell.home, args.environments) if cell.home else Path(sys.executable)
    against = [] if cell.format == PACKED else ["--against", PACKED]
    command = ["verify", cell.format, *against, "--runtime", cell.engine]
    said = verified(command, folder, python)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.suffix in WEIGHTS)
    return {"command": " ".join(["llmqat", *command]), "bytes": size, "cpu": llmqat.environment()["cpu"], **said}


def verified(command: list[str], folder: Path, python: Path) -> dict[str, Any]:
    """The JSON of ``llmqat verify``; the line that it printed, if the engine refused the model.

    Raises:
        SystemExit: if the engine could not even be imported, which says nothing about the model.
    """
    found = folder / "said.json"
    found.unlink(missing_ok=True)
    start = [sys.executable, "-m", "llmqat", *command, "--runtime-python", python, "--json", found.name]
    done = subprocess.run(start, cwd=folder, capture_output=True, text=True)
    if found.exists():
        return json.loads(found.read_text())
    line = done.stderr.strip().splitlines()[-1].removeprefix("llmqat: ")
    if any(sign in line for sign in NOT_INSTALLED):
        raise SystemExit(line)
    return {"refused": line}


def row(cell: Cell, found: dict[str, Any]) -> str:
    """One line of the table."""
    run = found["runtime"]
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    packed = cell.format == PACKED
    weights = "its own" if packed else "bit for bit" if not found["differences"] else "other"
    dtype = run["dtype"] + (", int8 activations" if run["int8"] else "")
    columns = (
        f"`{cell.format}`",
        f"{versions}, in {dtype}",
        cell.model,
        cell.grid.replace("-", " "),
        weights,
        f"{run['same_greedy']}/{run['passages']}",
        f"{run['max_error']:.1e}",
        f"{run['kl']:.1e} ({run['kl_bound']:.1e})" + ("" if run["ok"] else " **beyond**"),
        f"{run['top1']:.1%}",
        f"{found['bytes'] / 1e6:.1f}",
        f"{run['tokens_s']:.0f} ({found['cpu']})" if "tokens_s" in run else "",  # measured since it is
    )
    return f"| {' | '.join(columns)} |"


def table(results: dict[str, Any]) -> str:
    """What was measured, in Markdown: a row a cell, then what was refused."""
    found = {Cell(*key.split(" ")): value for key, value in results["cells"].items()}
    order = list(ENGINES)
    ordered = sorted(found, key=lambda cell: (order.index(cell.format), cell.engine, cell.grid, cell.model))
    rows = [row(cell, found[cell]) for cell in ordered if "runtime" in found[cell]]
    refused = dict.fromkeys(
        f"- `{cell.format}`, {cell.grid.replace('-', ' ')}: {found[cell]['refused']}"
        for cell in ordered
        if "refused" in found[cell]
    )
    machine = results["environment"]
    where = f"Measured on {machine['cpu']}, threads: {machine['threads']}, torch {machine['torch']}.\n"
    return "\n".join([where, HEAD + "\n".join(rows), *(["\nRefused:\n", *refused] if refused else []), ""])


def write_docs(results: dict[str, Any], page: Path) -> None:
    """Put the table between its marks into the page."""
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    page.write_text(before + begin + "\n" + table(results) + "\n" + end + after)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    engines = sorted({name for names in ENGINES.values() for name in names})
    parser.add_argument("--models", nargs="+", default=["llama"], help="as llmqat names them")
    parser.add_argument("--grids", nargs="+", choices=GRIDS, default=list(GRIDS))
    parser.add_argument("--engines", nargs="+", choices=engines, default=engines)
    parser.add_argument("--again", nargs="+", choices=engines, default=[], help="measure the cells of these once more")
    parser.add_argument("--install", action="store_true", help="make the environments of chosen engines first")
    parser.add_argument("--environments", type=Path, default=Path("runs/peers"), help="where environments are")
    parser.add_argument("--scratch", type=Path, default=Path("runs/engines"), help="where models are written")
    parser.add_argument("--output", type=Path, default=EVAL / "results" / "engines.json")
    parser.add_argument("--write-docs", action="store_true", help="only write the table of docs/serve.md")
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, and write the table."""
    args = arguments()
    if args.write_docs:
        return write_docs(json.loads(args.output.read_text()), EVAL.parent / "docs" / "serve.md")
    results = begun(args.output, {"environment": llmqat.environment()}, "cells", {})
    wanted = list(cells(args))
    if args.install:
        for home in sorted({cell.home for cell in wanted if cell.home}):
            environments.install(home, args.environments)
    for cell in wanted:
        if cell.key in results["cells"] and cell.engine not in args.again:
            continue
        if cell.home and not environments.python_of(cell.home, args.environments).exists():
            raise SystemExit(f"{cell.home} has no environment in {args.environments}: --install makes it")
        results["cells"][cell.key] = compared(cell, args)
        write(args.output, results)
        print(cell.key, results["cells"][cell.key].get("refused", "done"), flush=True)
    write_docs(results, EVAL.parent / "docs" / "serve.md")


if __name__ == "__main__":
    main()
