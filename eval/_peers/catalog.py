"""The peers: which worker runs them, in which environment, and what of it is measured. Standard library only."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Peer:
    """One row of the tables.

    Attributes:
        module: file of this package that defines the worker.
        package: distribution whose version is reported.
        options: keyword arguments of that class.
        environment: folder under ``--peer-envs``; None is the environment of llmqat.
        ops: whether single layers are measured.
        models: whether whole models are measured.
        worker: class of that file.
    """

    module: str
    package: str
    options: dict[str, Any] = field(default_factory=dict)
    environment: str | None = None
    ops: bool = True
    models: bool = True
    worker: str = "Worker"


A16, A8 = "llmqat-a16", "llmqat-a8"
A16_KERNEL, A8_KERNEL = "llmqat-a16-kernel", "llmqat-a8-kernel"  # without the operator around it
BF16, FP32 = "torch-bf16", "torch-fp32"
ATEN, GPTQMODEL, BITSANDBYTES = "aten-int4pack", "gptqmodel", "bitsandbytes-nf4"
Q4_0, Q8_0 = "llama.cpp-q4_0", "llama.cpp-q8_0"
READ = "read"  # no peer: the bandwidth that bounds them all

PEERS = {
    READ: Peer("bandwidth", "numpy"),
    A16: Peer("llmqat_peer", "llmqat", {"act_bits": None}),
    A8: Peer("llmqat_peer", "llmqat", {"act_bits": 8}),
    A16_KERNEL: Peer("llmqat_peer", "llmqat", {"act_bits": None}, models=False, worker="KernelWorker"),
    A8_KERNEL: Peer("llmqat_peer", "llmqat", {"act_bits": 8}, models=False, worker="KernelWorker"),
    BF16: Peer("torch_peers", "transformers", {"linear": "dense", "dtype": "bfloat16"}),
    FP32: Peer("torch_peers", "transformers", {"linear": "dense", "dtype": "float32"}),
    ATEN: Peer("torch_peers", "torch", {"linear": "int4pack"}),
    GPTQMODEL: Peer("torch_peers", "gptqmodel", {"linear": "gptqmodel"}, environment="gptqmodel"),
    BITSANDBYTES: Peer("torch_peers", "bitsandbytes", {"linear": "bitsandbytes"}),
    Q4_0: Peer("llama_cpp_peer", "llama-cpp-python", {"kind": "Q4_0"}, environment="llama-cpp", ops=False),
    Q8_0: Peer("llama_cpp_peer", "llama-cpp-python", {"kind": "Q8_0"}, environment="llama-cpp", ops=False),
}
