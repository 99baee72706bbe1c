"""What `eval/throughput.py` measures, how it samples, and how it reports.

Every peer runs in a worker process of its own (`worker`), in llmqat's environment or in one under ``runs/``
(`environments`). The script itself computes nothing while one of them is measured.
"""
