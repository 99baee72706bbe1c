"""Results of a sweep as JSON, rewritten after every part, so that a sweep goes on where it stopped."""

import json
from pathlib import Path
from typing import Any


def begun(path: Path, header: dict[str, Any], parts: str, empty: Any) -> dict[str, Any]:
    """What `path` holds under `parts`, if it was measured under the same `header`; else nothing yet.

    Args:
        path: of the JSON file; it need not exist.
        header: machine, versions, data: whatever must agree for two numbers to stand in one table.
        parts: key of the measured parts.
        empty: what stands there at the beginning.
    """
    header = json.loads(json.dumps(header))
    if path.exists():
        found = json.loads(path.read_text())
        differing = [key for key, value in header.items() if found.get(key) != value]
        if not differing:
            print(f"going on with the {len(found[parts])} parts of {path}", flush=True)
            return found
        print(f"{path} is replaced: it was measured with another {', '.join(differing)}", flush=True)
    return {**header, parts: empty}


def write(path: Path, results: dict[str, Any]) -> None:
    """Write `results` whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(json.dumps(results, indent=2) + "\n")
    scratch.replace(path)
