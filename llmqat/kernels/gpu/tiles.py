"""How much of a matrix one program takes: plain tables instead of a search at run time, which no run could repeat."""

from typing import NamedTuple


class Tile(NamedTuple):
    """The share of one program of a kernel, and with how many warps of 32 threads.

    Attributes:
        rows: of the weight.
        width: columns that are in registers at once, a power of two.
        warps: of the program.
    """

    rows: int
    width: int
    warps: int


# Weights that one program has in registers at once: 32 a thread of four warps, loaded 16 bytes at a time. With
# adapters half of them, or registers spill.
GRID_WEIGHTS = {False: 4096, True: 2048}
LONGEST_WIDTH = 256
MOST_ROWS = 64
# The walk of GPTQ along the columns of a block: a row's columns have to be at hand at once, and each waits for the one
# before, so that many small programs hide what a step costs. Of one warp, so that none waits for another; the rows are
# the least that fill the 32 bytes of a transfer. The width is that of the block.
COLUMNS_IN_ORDER = Tile(8, 128, 1)


def grid_tile(group: int, adapters: bool) -> Tile:
    """The tile of the kernels that make ``W_hat`` and the gradients of its grid.

    Args:
        group: weights of a row that share a scale.
        adapters: whether LoRA lies inside the quantizer.
    """
    width = min(LONGEST_WIDTH, power_of_two(group))
    return Tile(min(MOST_ROWS, GRID_WEIGHTS[adapters] // width), width, 4)


def search_tile(group: int) -> Tile:
    """The tile of the search for scales: weights that stay in registers while all candidates are tried.

    Args:
        group: weights of a row that share a scale; of a longer one parts are read for each candidate again.
    """
    return grid_tile(group, adapters=False)


def power_of_two(number: int) -> int:
    """The least power of two that is not below a positive `number`."""
    return 1 << (number - 1).bit_length()
