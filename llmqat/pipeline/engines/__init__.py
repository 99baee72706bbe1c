"""One file for each engine: what runs in it, and how.

`llmqat.pipeline.worker` loads this folder by its path, in the Python of an engine's own environment: the files of
engines import neither llmqat nor, at their top, their engine. Each has ``load(directory, job)``, whose result has what
`Model` of `passages.py` lists.
"""
