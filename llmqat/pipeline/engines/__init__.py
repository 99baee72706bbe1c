"""One file for each engine: what runs in it, and how.

`llmqat.pipeline.worker` loads this folder by its path, in the Python of an engine's own environment: the files of
engines import nothing of llmqat, and of other packages numpy and what their engine brings. Each has
``load(directory, job)``, whose result has what `Model` of `run_passages.py` lists.
"""
