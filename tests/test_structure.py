"""The shape of the repository: layers, sizes, what an import costs, and what may be committed."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmqat

ROOT = Path(__file__).resolve().parents[1]

# Place under llmqat/ -> its row in the layer table of CONTRIBUTING.md: it imports from its own row and those above.
ROWS = {
    "errors": 0,
    "compat": 0,
    "team": 0,
    "files": 0,
    "mapped": 0,
    "processes": 0,
    "progress": 0,
    "devices": 0,
    "version": 0,
    "machine": 0,
    "scheme": 0,
    "config": 0,
    "quant": 1,
    "data": 1,
    "kernels": 2,
    "nn": 3,
    "algorithms": 4,
    "models": 5,
    "serve": 5,
    "train": 6,
    "formats": 7,
    "metrics": 7,
    "forecast": 8,
    "report": 8,
    "pipeline": 9,
    "api": 10,
    "cli": 10,
}
SURFACE_ROW = 10  # `llmqat` itself, and __main__

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_ARGUMENTS = 7
# torch lays the arguments of these out flat: steps of an autograd Function, and the schema of an operator.
FLAT_STEPS = ("forward", "setup_context")
SCHEMAS = (("llmqat/kernels/ops.py", "_schema"), ("llmqat/nn/fake_quant_operator.py", "_schema"))

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate", "bitsandbytes", "matplotlib")

# The recipe that makes the bundled model reads its corpus from the module that also serves it to finetune; kernels
# without their operator, as the native decoder runs them, are timed below the surface.
PRIVATE_IMPORTS_ALLOWED = {
    ("recipes/bundled_llama", "llmqat.data.stdlib"),
    ("eval/_peers", "llmqat.kernels"),
}

# Compares kernels of a GPU with what they stand for, bit by bit.
BELOW_THE_SURFACE = {"eval/gpu.py"}

# A docstring opens with a verb of the domain, or names its subject.
VAGUE = re.compile(r"(Likewise|What|Those|See|It|As|Of|The same|The others?)\b")

# In pieces, so that this file does not hold what it looks for.
MACHINE_PATH = re.compile(r"(?<![\w.)}-])/(?:" + "|".join(["work", "root"]) + r")/")


def row_of(module: str) -> int:
    """Row of a dotted name, `llmqat` itself being the whole surface."""
    parts = module.split(".")
    return ROWS.get(parts[1], SURFACE_ROW) if len(parts) > 1 else SURFACE_ROW


def python_files(root: Path, *folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def absolute_base(node: ast.ImportFrom, path: Path, root: Path) -> str:
    """The module that a `from ... import` in `path` names, a relative one made absolute."""
    if not node.level:
        return node.module or ""
    package = path.relative_to(root).parent.parts
    return ".".join([*package[: len(package) - node.level + 1], *([node.module] if node.module else [])])


def public_homes(root: Path) -> dict[str, str]:
    """Public name -> the module `llmqat/__init__.py` takes it from; what it defines itself belongs to row 0."""
    tree = parse(root / "llmqat/__init__.py")
    homes = {"__version__": "llmqat.errors"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            homes |= {alias.asname or alias.name: node.module or "" for alias in node.names}
    return homes


def llmqat_imports(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Line and module of every import of llmqat in `path`, also inside functions and under TYPE_CHECKING."""
    homes = public_homes(root)
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.split(".")[0] == "llmqat")
        elif isinstance(node, ast.ImportFrom):
            base = absolute_base(node, path, root)
            if base == "llmqat":
                yield from ((node.lineno, homes.get(alias.name, f"llmqat.{alias.name}")) for alias in node.names)
            elif base.startswith("llmqat."):
                yield node.lineno, base


def back_edges(root: Path) -> list[str]:
    """Imports that go down the table."""
    found = []
    for path in python_files(root, "llmqat"):
        name = path.relative_to(root)
        if name == Path("llmqat/__init__.py"):  # the lazy surface
            continue
        own = row_of(".".join(name.with_suffix("").parts))
        found += [
            f"{name}:{line} (row {own}) imports {module} (row {row_of(module)})"
            for line, module in llmqat_imports(path, root)
            if row_of(module) > own
        ]
    return found


def oversized(root: Path) -> list[str]:
    """Files and functions over the limits."""
    found = []
    for path in python_files(root, "llmqat", "eval"):
        name = path.relative_to(root)
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            found.append(f"{name}: {lines} lines, the limit is {MAX_FILE_LINES}")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    found.append(f"{name}:{node.lineno} {node.name}: {length} lines, the limit is {MAX_FUNCTION_LINES}")
    return found


def functions(tree: ast.AST, bases: tuple[str, ...] = ()) -> Iterator[tuple[ast.FunctionDef, tuple[str, ...]]]:
    """Every function below `tree`, with the base classes of the class that it is a method of."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            yield from functions(node, tuple(map(ast.unparse, node.bases)))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, bases
            yield from functions(node)
        else:
            yield from functions(node, bases)


def argument_count(function: ast.FunctionDef) -> int:
    """Positional and keyword-only arguments; an opening `self`, `cls` or `ctx`, ``*args`` and ``**options`` are not
    counted."""
    arguments = function.args
    names = [argument.arg for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
    return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))


def is_autograd_step(function: ast.FunctionDef, bases: tuple[str, ...]) -> bool:
    return function.name in FLAT_STEPS and any(base.endswith("autograd.Function") for base in bases)


def crowded(root: Path) -> list[str]:
    """Functions with more arguments than a call shows at a glance; constructors of dataclasses have no `def`."""
    found = []
    for path in python_files(root, "llmqat", "eval"):
        name = path.relative_to(root).as_posix()
        for node, bases in functions(parse(path)):
            count = argument_count(node)
            if count > MAX_ARGUMENTS and not is_autograd_step(node, bases) and (name, node.name) not in SCHEMAS:
                found.append(f"{name}:{node.lineno} {node.name}: {count} arguments, the limit is {MAX_ARGUMENTS}")
    return found


def cpp_functions(lines: list[str]) -> Iterator[tuple[int, str, int]]:
    """Line, head and length of the functions of a C++ file that are not members: both ends stand at the margin."""
    start = None
    for number, line in enumerate(lines, start=1):
        if line.endswith("{") and re.match(r"(?!namespace|struct|class|enum|extern)[\w\[]", line):
            start = number
        elif line == "}" and start is not None:
            yield start, lines[start - 1].rstrip(" {"), number - start + 1
            start = None


def oversized_cpp(root: Path) -> list[str]:
    """Files and functions of the kernels over the same limits."""
    found = []
    for path in sorted((root / "llmqat/kernels/csrc").rglob("*")):
        if path.suffix not in (".h", ".cpp", ".inc"):
            continue
        name, lines = path.relative_to(root), path.read_text(encoding="utf-8").splitlines()
        if len(lines) > MAX_FILE_LINES:
            found.append(f"{name}: {len(lines)} lines, the limit is {MAX_FILE_LINES}")
        for line, head, length in cpp_functions(lines):
            if length > MAX_FUNCTION_LINES:
                found.append(f"{name}:{line} {head}: {length} lines, the limit is {MAX_FUNCTION_LINES}")
    return found


def vague_openings(root: Path) -> list[str]:
    """Docstrings whose first line is understood only with the line above it, or with the code below."""
    found = []
    for path in python_files(root, "llmqat"):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if VAGUE.match(first):
                    found.append(f"{path.relative_to(root)}:{getattr(node, 'lineno', 1)}: {first[:90]}")
    return found


def private_uses(path: Path) -> Iterator[tuple[int, str]]:
    """Line and name of whatever of llmqat `path` uses that is not public."""
    public = {*llmqat.__all__, "__version__"}
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names if alias.name.startswith("llmqat."))
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            if node.module.startswith("llmqat."):
                yield node.lineno, node.module
            elif node.module == "llmqat":
                yield from ((node.lineno, f"llmqat.{alias.name}") for alias in node.names if alias.name not in public)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "llmqat" and node.attr not in public:
            yield node.lineno, f"llmqat.{node.attr}"


def private_uses_of_scripts(root: Path) -> dict[tuple[str, str], str]:
    """(folder, private name) -> where, for everything under eval/ and recipes/."""
    return {
        (path.relative_to(root).parent.as_posix(), name): f"{path.relative_to(root)}:{line} uses {name}"
        for path in python_files(root, "eval", "recipes")
        for line, name in private_uses(path)
        if path.relative_to(root).as_posix() not in BELOW_THE_SURFACE
    }


def machine_paths(root: Path, names: list[str]) -> list[str]:
    """Lines of text files that name a folder of one machine."""
    found = []
    for name in names:
        data = (root / name).read_bytes() if (root / name).is_file() else b""
        if b"\0" in data[:8192]:
            continue
        for number, line in enumerate(data.decode("utf-8", errors="replace").splitlines(), start=1):
            if MACHINE_PATH.search(line):
                found.append(f"{name}:{number}: {line.strip()[:120]}")
    return found


def committed_files(root: Path) -> list[str]:
    """Files that git tracks or would add."""
    if not (root / ".git").exists():
        pytest.skip("not a git checkout: there is nothing to commit")
    command = ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout
    return [name for name in listing.split("\0") if name]


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def test_imports_go_up_the_layer_table():
    found = back_edges(ROOT)
    assert not found, "a file imports only from its own row or rows above (CONTRIBUTING.md):\n" + "\n".join(found)


def test_every_place_has_a_row():
    package = ROOT / "llmqat"
    places = {path.stem for path in package.iterdir() if path.suffix == ".py" or any(path.glob("*.py"))}
    assert places - {"__init__", "__main__"} == set(ROWS), (
        "each file and folder under llmqat/ has a row, and only those"
    )


SURFACE = "from llmqat.scheme import QuantScheme\nif TYPE_CHECKING:\n    from llmqat.api import finetune\n"


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from llmqat.models.patcher import prepare", "llmqat.models.patcher"),
        ("import llmqat.api", "llmqat.api"),
        ("import llmqat", "llmqat"),
        ("from llmqat import train", "llmqat.train"),
        ("from llmqat import finetune", "llmqat.api"),
        ("from llmqat import pipeline", "llmqat.pipeline"),
        ("from ..formats import gguf", "llmqat.formats"),
        ("from .. import train", "llmqat.train"),
        ("def f():\n    from llmqat.nn.lora import x", "llmqat.nn.lora"),
        ("if TYPE_CHECKING:\n    from llmqat.nn.lora import X", "llmqat.nn.lora"),
    ],
)
def test_a_back_edge_is_found(tmp_path, source, module):
    root = write(tmp_path, {"llmqat/__init__.py": SURFACE, "llmqat/quant/affine.py": f"import torch\n{source}\n"})
    (found,) = back_edges(root)
    assert re.fullmatch(
        rf"llmqat/quant/affine\.py:\d+ \(row 1\) imports {re.escape(module)} \(row {row_of(module)}\)", found
    )


@pytest.mark.parametrize(
    "source",
    [
        "from llmqat.scheme import QuantScheme",
        "from llmqat import QuantScheme, __version__",
        "from llmqat.quant.packing import pack_rows",
        "from .packing import pack_rows",
        "import transformers.models",
    ],
)
def test_an_upward_import_passes(tmp_path, source):
    assert not back_edges(write(tmp_path, {"llmqat/__init__.py": SURFACE, "llmqat/quant/affine.py": source}))


def test_files_and_functions_stay_small():
    found = oversized(ROOT) + oversized_cpp(ROOT)
    assert not found, "split by meaning:\n" + "\n".join(found)


def test_an_oversized_file_and_function_are_found(tmp_path):
    at_limit = "def f():\n" + "    pass\n" * (MAX_FUNCTION_LINES - 1)
    write(tmp_path, {"llmqat/a.py": at_limit, "llmqat/b.py": "x = 1\n" * MAX_FILE_LINES})
    assert not oversized(tmp_path)
    write(tmp_path, {"llmqat/a.py": at_limit + "    pass\n", "eval/b.py": "x = 1\n" * (MAX_FILE_LINES + 1)})
    assert oversized(tmp_path) == [
        "eval/b.py: 401 lines, the limit is 400",
        "llmqat/a.py:1 f: 61 lines, the limit is 60",
    ]


def test_functions_take_few_arguments():
    found = crowded(ROOT)
    assert not found, "give what travels together a value of its own:\n" + "\n".join(found)


def test_a_crowded_function_is_found(tmp_path):
    seven = ", ".join("abcdefg")
    passing = (
        f"def f({seven}, *args, **options): pass\n"
        f"class A:\n    def f(self, {seven}): pass\n"
        f"class B(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, {seven}, h): pass\n"
        f"@dataclass\nclass C:\n" + "".join(f"    {name}: int\n" for name in "abcdefgh")
    )
    write(tmp_path, {"llmqat/a.py": passing, "llmqat/kernels/ops.py": f"def _schema({seven}, h): pass\n"})
    assert crowded(tmp_path) == []
    found = (
        f"def f({seven}, *, h): pass\n"
        f"class A:\n    def f(self, {seven}, h):\n        def g({seven}, i): pass\n"
        f"    @staticmethod\n    def forward({seven}, h): pass\n"
        f"class B(torch.autograd.Function):\n    @staticmethod\n    def apply_all({seven}, h): pass\n"
        f"def _schema({seven}, h): pass\n"
    )
    write(tmp_path, {"llmqat/a.py": "", "eval/b.py": found})
    names = ("1 f", "3 f", "4 g", "6 forward", "9 apply_all", "10 _schema")
    assert crowded(tmp_path) == [f"eval/b.py:{name}: 8 arguments, the limit is 7" for name in names]


def test_an_oversized_cpp_file_and_function_are_found(tmp_path):
    at_limit = "namespace llmqat {\nvoid f() {\n" + "    g();\n" * (MAX_FUNCTION_LINES - 2) + "}\n"
    kernels = "llmqat/kernels/csrc"
    write(tmp_path, {f"{kernels}/core/a.cpp": at_limit, f"{kernels}/x86/b.inc": "// x\n" * MAX_FILE_LINES})
    assert not oversized_cpp(tmp_path)
    longer = at_limit.replace("f() {", "f() {\n    g();")
    write(tmp_path, {f"{kernels}/core/a.cpp": longer, f"{kernels}/x86/b.inc": "// x\n" * (MAX_FILE_LINES + 1)})
    assert oversized_cpp(tmp_path) == [
        f"{kernels}/core/a.cpp:2 void f(): 61 lines, the limit is 60",
        f"{kernels}/x86/b.inc: 401 lines, the limit is 400",
    ]


def test_docstrings_are_understood_alone():
    found = vague_openings(ROOT)
    assert not found, "name the subject in the first line (CONTRIBUTING.md, style 5):\n" + "\n".join(found)


def test_a_vague_docstring_is_found(tmp_path):
    source = '"""Shapes of things."""\n\ndef f():\n    """Of the kind of `g`."""\n\nclass C:\n    """Assemble."""\n'
    root = write(tmp_path, {"llmqat/a.py": source, "llmqat/b.py": '"""What it does."""\n'})
    assert vague_openings(root) == ["llmqat/a.py:3: Of the kind of `g`.", "llmqat/b.py:1: What it does."]


def test_import_llmqat_is_light():
    code = f"import sys, llmqat; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True, text=True)
    assert done.stdout.split() == [], f"`import llmqat` pulls {done.stdout.strip()}: import it where it is needed"


def test_scripts_use_the_public_surface():
    found = private_uses_of_scripts(ROOT)
    private = [where for key, where in found.items() if key not in PRIVATE_IMPORTS_ALLOWED]
    assert not private, f"eval/ and recipes/ use llmqat.{{{', '.join(llmqat.__all__)}}} only:\n" + "\n".join(private)
    stale = PRIVATE_IMPORTS_ALLOWED - found.keys()
    assert not stale, f"no longer needed in PRIVATE_IMPORTS_ALLOWED: {stale}"


def test_a_private_use_is_found(tmp_path):
    source = (
        "import llmqat\nfrom llmqat import QuantScheme, api\nimport llmqat.nn.lora\nfrom llmqat.quant import affine\n"
    )
    root = write(tmp_path, {"eval/speed.py": source + "llmqat.perplexity\nllmqat.quant\n"})
    assert list(private_uses_of_scripts(root).values()) == [
        "eval/speed.py:2 uses llmqat.api",
        "eval/speed.py:3 uses llmqat.nn.lora",
        "eval/speed.py:6 uses llmqat.quant",
    ]


def test_changelog_has_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert llmqat.__version__ in headings


def test_no_machine_paths_are_committed():
    found = machine_paths(ROOT, committed_files(ROOT))
    assert not found, "paths of one machine do not belong in the repository:\n" + "\n".join(found)


def test_a_machine_path_is_found(tmp_path):
    path = "/" + "work" + "/runs"
    write(tmp_path, {"a.md": f"see {path}\nand https://example.org{path} and ../net{path}\n", "b.bin": f"\0 {path}"})
    assert machine_paths(tmp_path, ["a.md", "b.bin", "deleted.md"]) == [f"a.md:1: see {path}"]
