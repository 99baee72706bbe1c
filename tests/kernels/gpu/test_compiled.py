"""Kernels compiled for GPUs that are not there: they compile, fit the chip, and round where they must."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
# Shared memory that one program can have (CUDA C++ Programming Guide, compute capabilities), bytes.
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


@cache
def rows() -> list[dict]:
    """What `compile_all` printed, by a process that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.gpu.compile_all"]
    made = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return json.loads(made.stdout)


def of(launch: str) -> list[dict]:
    found = [row for row in rows() if row["launch"].startswith(launch)]
    assert {row["capability"] for row in found} == set(SHARED)
    return found


def test_no_kernel_spills_or_outgrows_shared_memory():
    for row in rows():
        assert row["stack"] == 0, row
        assert row["registers"] < 255, row
        assert row["shared"] <= SHARED[row["capability"]], row


@pytest.mark.parametrize("launch", ["w_hat", "gradients", "search", "walk"])
def test_what_finds_codes_divides_exactly_and_contracts_nothing(launch):
    for row in of(launch):
        assert "div.rn.f32" in row["ptx"]
        for inexact in ("div.full.f32", "div.approx", "rcp.approx", ".ftz"):
            assert inexact not in row["ptx"], row["launch"]
        # The fused multiply-adds are those of adapters, which `tl.fma` asks for.
        adapters = "adapters" in row["launch"] or launch == "gradients"
        assert ("fma.rn.f32" in row["ptx"]) == adapters, row["launch"]


def test_activations_and_losses_divide_exactly_and_are_read_sixteen_bytes_at_a_time():
    for launch in ("activations", "losses by a teacher", "state errors"):
        for row in of(launch):
            assert "div.rn.f32" in row["ptx"]
            assert "div.full.f32" not in row["ptx"]
            assert "ld.global.v4" in row["ptx"], row["launch"]
            assert "st.global.v4" in row["ptx"], row["launch"]


@pytest.mark.parametrize("launch", ["w_hat", "search", "walk"])
def test_weights_are_read_sixteen_bytes_at_a_time(launch):
    for row in of(launch):
        assert "ld.global.v4" in row["ptx"], row["launch"]


def test_one_launch_makes_a_weight_and_one_its_gradients():
    for launch in ("w_hat", "gradients"):
        names = {row["launch"] for row in of(launch)}
        assert len(of(launch)) == len(names) * len(SHARED)


def test_products_read_wide_and_multiply_by_tensor_cores():
    for row in of("product"):
        if row["name"] == "_add_parts":
            continue
        wide = "ld.global.v4" if "float32" in row["launch"] else "], 0x10"  # bytes of an asynchronous copy
        assert wide in row["ptx"], row["launch"]
        assert ("mma.sync" in row["ptx"]) == ("float32" not in row["launch"]), row["launch"]
        assert ".ftz" not in row["ptx"], row["launch"]


def test_packed_weights_are_rounded_to_nearest_and_written_sixteen_bytes_at_a_time():
    for row in of("dequantized"):
        assert "st.global.v4" in row["ptx"]
        assert "ld.global.v4" in row["ptx"]
        assert "cvt.rn.bf16" in row["ptx"]
        assert "fma.rn.f32" not in row["ptx"]
