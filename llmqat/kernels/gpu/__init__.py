"""Triton kernels for GPUs: the grid bit for bit as a CPU finds it, in one launch instead of hundreds.

`available` says whether they run on a device, and why not; `tiles` holds how much of a matrix one program takes. The
other files each hold kernels and the functions that launch them, for tensors of any device that Triton reaches. They
import triton, so what decides imports them late: a machine without it runs torch.

All of them follow the same rules, so that codes never depend on the device: division by `tl.div_rn`, no fused
multiply-add but where `tl.fma` says so (every launch passes `EXACT`), rounding to even and to bfloat16 by the functions
of `numerics`, and no arithmetic in bfloat16, which Triton's interpreter gets wrong. `tl.full` makes zeros: before
Triton 3.9 `tl.zeros` takes no size that is a field of a constant.
"""
