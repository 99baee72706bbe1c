"""Quantized checkpoints of others as packed directories: codes and scales moved bit for bit, one file a format."""
