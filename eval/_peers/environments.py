"""Environments of peers that must not share one with llmqat: made under ``runs/`` on request, never a dependency."""

import os
import subprocess
import tarfile
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

EVAL = Path(__file__).resolve().parents[1]

LLAMA_CPP = "llama-cpp-python==0.3.36"
# What llama.cpp is built with: the instructions of this machine, none of what is not measured.
LLAMA_CPP_FLAGS = "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"
# The intrinsic declares only the first 8 of the 64 bytes that it reads, so gcc drops the stores to the rest of the
# configuration and the first tile instruction faults (llama.cpp issue 20824, pull request 26954). The barrier keeps
# the stores; nothing else changes.
AMX_SOURCE = "vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp"
AMX_LOAD = "    _tile_loadconfig(&tc);\n"
AMX_BARRIER = '    __asm__ __volatile__("" : : "r"(&tc) : "memory");\n'
GPTQMODEL = "gptqmodel==7.7.0"
COMPILE_GPTQMODEL = (
    "from gptqmodel.nn_modules.qlinear.torch_cpu_avx512 import TorchCpuAvx512Linear as layer; layer.validate_once()"
)


def pip(directory: Path, *arguments: str | Path, **variables: str) -> None:
    """Run the pip of an environment, which is created first where needed."""
    python = directory / "bin" / "python"
    if not python.exists():
        venv.create(directory, with_pip=True)
    subprocess.run([python, "-m", "pip", *arguments], env={**os.environ, **variables}, check=True)


def made(directory: Path, recipe: str, install: Callable[[Path], None]) -> Path:
    """The Python of the environment `directory`; `install` is called if it is not there or of another recipe."""
    if not is_made(directory, recipe):
        install(directory)
        (directory / "installed.txt").write_text(recipe)  # last: an interrupted installation is taken up again
    return directory / "bin" / "python"


def is_made(directory: Path, recipe: str) -> bool:
    """Whether the environment was completed by this recipe."""
    installed = directory / "installed.txt"
    return installed.exists() and installed.read_text() == recipe


def from_requirements(directory: Path, requirements: Path) -> Path:
    """The Python of an environment with the packages of a requirements file."""
    return made(directory, requirements.read_text(), lambda at: pip(at, "install", "-r", requirements))


def llama_cpp_recipe() -> str:
    """What the environment of llama.cpp is made of, in one text."""
    return "\n".join([LLAMA_CPP, LLAMA_CPP_FLAGS, AMX_BARRIER, "gguf"])


def install_llama_cpp(directory: Path) -> None:
    """Build llama.cpp from source for this machine, its AMX fault mended. Minutes; needs a C++ compiler."""
    with tempfile.TemporaryDirectory() as scratch:
        pip(directory, "download", "--no-deps", "--no-binary", ":all:", "-d", scratch, LLAMA_CPP)
        (archive,) = Path(scratch).glob("*.tar.gz")
        with tarfile.open(archive) as file:
            file.extractall(scratch, filter="data")
        source = Path(scratch) / archive.name.removesuffix(".tar.gz")
        mend_amx(source / AMX_SOURCE)
        options = {"CMAKE_ARGS": LLAMA_CPP_FLAGS, "CMAKE_BUILD_PARALLEL_LEVEL": str(len(os.sched_getaffinity(0)))}
        pip(directory, "install", source, "gguf", **options)


def mend_amx(source: Path) -> None:
    """Put a compiler barrier before the only load of a tile configuration in llama.cpp's AMX kernels."""
    text = source.read_text()
    if text.count(AMX_LOAD) != 1:
        raise SystemExit(f"{source.name} of {LLAMA_CPP} loads its tile configuration elsewhere: look at AMX_LOAD again")
    source.write_text(text.replace(AMX_LOAD, AMX_BARRIER + AMX_LOAD))


def gptqmodel_recipe() -> str:
    """What the environment of GPTQModel is made of, in one text."""
    return (EVAL / "gptqmodel_env.txt").read_text() + GPTQMODEL


def install_gptqmodel(directory: Path) -> None:
    """Install GPTQModel on the torch of the other peers, and have its CPU kernel compiled, if the machine is for it."""
    pip(directory, "install", "-r", EVAL / "gptqmodel_env.txt")
    pip(directory, "install", "--no-deps", GPTQMODEL)
    subprocess.run([directory / "bin" / "python", "-c", COMPILE_GPTQMODEL], check=True)


# Folder -> what it is made of, and how.
RECIPES = {
    "llama-cpp": (llama_cpp_recipe, install_llama_cpp),
    "gptqmodel": (gptqmodel_recipe, install_gptqmodel),
}


def install(name: str, environments_at: Path) -> Path:
    """The Python of a peer's environment, made first where needed."""
    recipe, installer = RECIPES[name]
    return made(environments_at / name, recipe(), installer)
