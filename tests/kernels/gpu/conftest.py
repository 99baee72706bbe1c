"""The tests of this folder need triton, which has wheels for Linux alone."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
