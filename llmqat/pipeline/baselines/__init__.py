"""Other tools that quantize a float model after its training, a file each: what a run is compared with.

Each file is run in the Python of the tool's own environment (see `llmqat.pipeline.other_python`), and imports nothing
of llmqat. Its ``run(job, folder)`` gets what `llmqat.pipeline.measure_baselines` tells it, and leaves the weights that
the layers on a grid compute with in the folder, as ``weights.safetensors``.
"""
