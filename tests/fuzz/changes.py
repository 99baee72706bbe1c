"""`changed`: JSON with something else in one place."""

import copy
from typing import Any

from hypothesis import strategies as st


def changed(parsed: Any, draw: Any, values: st.SearchStrategy[Any], keys: st.SearchStrategy[str]) -> Any:
    """A copy of `parsed` with one of `values` in one place, without what is there, or with one more key of `keys`."""
    if not isinstance(parsed, dict | list) or not parsed:
        return draw(values)
    result = copy.deepcopy(parsed)
    target, key = result, None
    while isinstance(target, dict | list) and target:
        key = draw(st.sampled_from(list(target))) if isinstance(target, dict) else draw(st.integers(0, len(target) - 1))
        if not isinstance(target[key], dict | list) or not target[key] or draw(st.integers(0, 5)) == 0:
            break
        target = target[key]
    kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add"]))
    if kind == "remove":
        del target[key]
    elif kind == "add" and isinstance(target, dict):
        target[draw(keys)] = draw(values)
    else:
        target[key] = draw(values)
    return result
