"""GPTQ (Frantar et al., arXiv 2210.17323) for group-wise grids, as a pure function.

Differences from the paper, each measured to help or to be needed for training:

- act-order with *static groups*: columns are visited by falling ``diag(H)``, while a column keeps the scale of the
  group it lies in, so inference needs no permutation;
- scales come from a search over shrunken ranges, on scales already rounded to their storage dtype; it weighs a column's
  error by ``1 / diag(H^-1)``, what it costs after the others have compensated (the paper's eq. 2). ``diag(H)`` leaves
  the compensation out, and gave a higher KL divergence on the bundled model;
- columns that calibration never excited keep their round-to-nearest value instead of becoming zero;
- the compensated weight just before rounding is returned too: the latent that training starts from.
"""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.kernels.gpu.available import runs_on
from llmqat.quant.affine import check_weight, code_values, dequantize, grouped, ranges_of
from llmqat.quant.full_float32 import full_float32
from llmqat.quant.grid import Grid, row_chunks
from llmqat.scheme import QuantScheme

SHRINK_GRID = tuple(1 - i / 40 for i in range(24))
BLOCK_COLUMNS = 128
MAX_DAMP = 1.0
# A latent beyond the ends of the grid is pulled back to this many codes outside: it keeps its code, and can return.
LATENT_MARGIN = 0.49


class GPTQResult(NamedTuple):
    """Codes and errors that `gptq` found for one layer.

    Attributes:
        codes: ``(out, in)``, float32 holding integers of the scheme.
        scale: ``(out, groups)`` in the storage dtype.
        zero_point: ``(out, groups)`` float32 holding integers, or None.
        latent: ``(out, in)`` float32, the compensated weight before rounding; quantizing it gives `codes` exactly.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    latent: Tensor


def search_scale(
    weight: Tensor, importance: Tensor, scheme: QuantScheme, storage_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of the least weighted error ``sum_j importance_j (W_j - W_hat_j)^2`` in each group.

    Args:
        weight: ``(out, in)``.
        importance: ``(in,)``, non-negative; ones for plain squared error.
        scheme: the grid.
        storage_dtype: dtype in which scales are stored.
    """
    flips = (False, True) if scheme.symmetric else (False,)
    candidates = [(shrink, flip) for shrink in SHRINK_GRID for flip in flips]
    if _in_kernels(weight, storage_dtype):
        from llmqat.kernels.gpu import gptq as kernels

        return kernels.search_scale(weight, importance, scheme, storage_dtype, candidates)
    ranges = ranges_of(weight, scheme)
    scale, zero_point = ranges.scale(scheme, storage_dtype)
    for rows in row_chunks(*weight.shape):
        best = torch.full_like(scale[rows], torch.inf, dtype=torch.float32)
        for shrink, flip in candidates:
            s, z = ranges.rows(rows).scale(scheme, storage_dtype, shrink, flip)
            w_hat = dequantize(code_values(weight[rows], s, z, scheme), s, z, scheme)
            error = grouped((w_hat.float() - weight[rows]).square_().mul_(importance), scheme).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            scale[rows] = torch.where(better, s, scale[rows])
            if z is not None and zero_point is not None:
                zero_point[rows] = torch.where(better, z, zero_point[rows])
    return scale, zero_point


def _in_kernels(weight: Tensor, storage_dtype: torch.dtype) -> bool:
    """Whether the Triton kernels take a weight, whose scales are stored in a dtype, where it is."""
    if not runs_on(weight.device):
        return False
    from llmqat.kernels.gpu import gptq as kernels

    return kernels.takes(weight, storage_dtype)


def check_hessian(hessian: Tensor, layer: str) -> None:
    """Refuse the Hessian of calibration inputs that were not finite.

    Raises:
        LlmqatError: if the Hessian holds NaN or infinity.
    """
    if not torch.isfinite(hessian).all():
        raise LlmqatError(
            f"the calibration inputs of {layer} hold NaN or infinity; check the float model and its dtype"
        )


def inverse_cholesky(hessian: Tensor, damp: float, layer: str) -> Tensor:
    """Upper Cholesky factor ``U`` of ``(H + damp * mean(diag H) * I)^-1``.

    Damping is raised tenfold, with a warning, while the factorization fails. Beside H, which is damped in place and put
    back, two matrices of its size are in memory.

    Raises:
        LlmqatError: if it fails even at a damping of 1.
    """
    diagonal = hessian.diagonal().clone()
    mean = diagonal.mean()
    while True:
        hessian.diagonal().copy_(diagonal + damp * mean)
        try:
            factor = torch.linalg.cholesky(hessian)
            factor = torch.cholesky_inverse(factor)
            return torch.linalg.cholesky(factor, upper=True)
        except torch.linalg.LinAlgError as error:
            if damp >= MAX_DAMP:
                raise LlmqatError(
                    f"GPTQ cannot invert the Hessian of {layer}, even at damping {damp:g}; give it more or more varied "
                    "calibration tokens (--calibration-samples), or keep the layer out of it with an override"
                ) from error
            damp = min(MAX_DAMP, max(damp, 1e-3) * 10)
            warnings.warn(
                f"GPTQ: the Hessian of {layer} is not positive definite; damping raised to {damp:g}", stacklevel=2
            )
        finally:
            hessian.diagonal().copy_(diagonal)


@full_float32()
def gptq(
    weight: Tensor,
    hessian: Tensor,
    scheme: QuantScheme,
    storage_dtype: torch.dtype,
    damp: float = 0.01,
    layer: str = "layer",
) -> GPTQResult:
    """Quantize one layer so that ``||(W - W_hat) X||^2`` stays small, given ``H = 2/n X X^T``.

    Args:
        weight: ``(out, in)``.
        hessian: ``(in, in)`` float32, symmetric, from the layer's calibration inputs.
        scheme: the grid.
        storage_dtype: dtype in which scales are stored.
        damp: added to the diagonal of H, as a fraction of its mean.
        layer: name for messages.

    Raises:
        LlmqatError: if the weight or H holds a non-finite value, or H cannot be inverted.
    """
    check_weight(weight, scheme, storage_dtype, layer)
    check_hessian(hessian, layer)
    W, diagonal = weight.detach().float(), hessian.diagonal().float()
    # Nothing to compensate with or for: the column keeps its round-to-nearest code. In the unit of H, or it would drown
    # the damping of the others.
    dead = diagonal == 0
    diagonal = torch.where(dead, 1.0 if dead.all() else diagonal[~dead].mean(), diagonal)
    perm = diagonal.argsort(descending=True)
    inverse = perm.argsort()
    H = hessian.float()[perm][:, perm]
    H.diagonal().copy_(diagonal[perm])
    U = inverse_cholesky(H, damp, layer)
    importance = 1 / U.square().sum(0)[inverse]  # diag(H^-1) is that of U^T U
    scale, zero_point = search_scale(W, importance, scheme, storage_dtype)

    group = torch.div(perm, scheme.group_length(W.shape[1]), rounding_mode="floor")
    grid = Grid(scale, zero_point, None, scheme, storage_dtype)
    latent, codes = _quantize_columns(W[:, perm], U, group, grid)

    codes, latent = codes[:, inverse], latent[:, inverse]
    return GPTQResult(codes, scale, zero_point, _anchor(latent, codes, scale, zero_point, scheme))


def _quantize_columns(W: Tensor, U: Tensor, group: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The column loop (paper, algorithm 1) on permuted columns, whose groups on the grid are `group` ``(in,)``.

    Returns:
        the weight of each column just before it was rounded, and its codes.
    """
    quantize_block = _quantize_block
    if _in_kernels(W, grid.storage_dtype):
        from llmqat.kernels.gpu.gptq import quantize_block
    latent = W.T.contiguous()  # a column lies in one piece, and so do the columns behind it
    codes, columns = torch.empty_like(latent), len(latent)
    for i1 in range(0, columns, BLOCK_COLUMNS):
        block = slice(i1, min(i1 + BLOCK_COLUMNS, columns))
        Err1 = quantize_block(latent[block], codes[block], U[block, block], group[block], grid)
        latent[block.stop :] -= U[block, block.stop :].T @ Err1
    return latent.T, codes.T


def _quantize_block(latent: Tensor, codes: Tensor, U: Tensor, group: Tensor, grid: Grid) -> Tensor:
    """The columns of a block, one after the other: writes their codes, and changes those behind each.

    Args:
        latent: ``(block, out)``; it becomes the weight of each column just before it is rounded.
        codes: of the same shape; they are written.
        U: of the block, ``(block, block)``.
        group: of each column.
        grid: of the weight.

    Returns:
        the error of each column, divided by the diagonal of U, ``(block, out)``.
    """
    per_column = QuantScheme(grid.scheme.bits, 1, grid.scheme.symmetric)
    s = grid.scale[:, group].T.contiguous()
    z = None if grid.zero_point is None else grid.zero_point[:, group].T.contiguous()
    Err1 = torch.empty_like(latent)
    for j in range(len(latent)):
        w, sc, zc = latent[j, :, None], s[j, :, None], None if z is None else z[j, :, None]
        code = code_values(w, sc, zc, per_column)
        q = dequantize(code, sc, zc, per_column).float()
        codes[j], err = code[:, 0], ((w - q) / U[j, j])[:, 0]
        Err1[j] = err
        latent[j + 1 :] -= U[j, j + 1 :, None] * err
    return Err1


def _anchor(latent: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Keep latents within reach of the grid, and make sure each still rounds to its code."""
    length = scheme.group_length(latent.shape[1])
    s = scale.float().repeat_interleave(length, 1)
    z = s.new_zeros(()) if zero_point is None else zero_point.repeat_interleave(length, 1)
    v = (latent / s).clamp(scheme.qmin - z - LATENT_MARGIN, scheme.qmax - z + LATENT_MARGIN)
    latent = v * s
    moved = code_values(latent, scale, zero_point, scheme) != codes
    return torch.where(moved, (codes - z) * s, latent)
