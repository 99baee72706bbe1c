"""Time and memory of a run before any work: its own code, run on tensors that have shapes and no values."""
