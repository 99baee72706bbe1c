"""Run one module of this package in another Python: started by `other_python`, with a folder that holds a job.

That Python may have neither llmqat nor torch. The module is loaded by its path, with its folder as its package, and its
``run(job, folder)`` returns what goes into the result.
"""

import importlib.util
import json
import sys
import time
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

JOB, RESULT = "job.json", "result.json"


def module_at(path: Path) -> Any:
    """The module of a file, in a package of the files beside it."""
    package = path.parent.name
    spec = importlib.util.spec_from_file_location(package, path.parent / "__init__.py")
    assert spec is not None
    sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{path.stem}")


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The result of a job, its seconds, and the versions of the modules that it needs; or those of them that are
    missing."""
    missing = [module for module in job["needs"] if importlib.util.find_spec(module) is None]
    if missing:
        return {"missing": missing}
    wall, processor = time.perf_counter(), time.process_time()
    said = module_at(Path(job["module"])).run(job, folder) if job["module"] else {}
    took = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}
    return {**said, **took, "versions": dict(map(installed, job["needs"]))}


def installed(module: str) -> tuple[str, str]:
    """Name and version of the package that a module belongs to; of the module, where it was not installed."""
    for name in packages_distributions().get(module, ()):
        return name.replace("_", "-"), version(name)
    return module, importlib.import_module(module).__version__


def main() -> None:
    """Run the job in the folder that the command line names."""
    folder = Path(sys.argv[1])
    result = run(json.loads((folder / JOB).read_text("utf-8")), folder)
    (folder / RESULT).write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
