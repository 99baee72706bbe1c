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


# Products with packed weights. Tokens up to which a kernel reads the codes for each product, by the bytes of a number
# of `x`; of more tokens ``W_hat`` is made once, and the product is torch's.
FEW_TOKENS = {4: 4, 2: 64}
# Tokens that tensor cores multiply at once.
FEWEST_TOGETHER, MOST_TOGETHER = 16, 64
# Programs at which columns are divided no further: four for each of an H100's 132 multiprocessors, of any GPU, so that
# sums are the same on all.
ENOUGH_PROGRAMS = 528
FEWEST_STEPS = 2  # that a program takes along its columns

# Columns and rows of a product's tile, at which a thread of four warps has 16 bytes of codes; of fewer columns with
# tensor cores, so that twice as many rows share a tile of `x`.
PRODUCT_COLUMNS = {2: 512, 3: 256, 4: 256, 8: 128}
PRODUCT_ROWS = {2: 16, 3: 16, 4: 16, 8: 32}
TOGETHER_COLUMNS = {2: 128, 3: 128, 4: 128, 8: 64}
TOGETHER_ROWS = 32


def product_tile(bits: int, columns: int, together: bool) -> Tile:
    """The tile of the kernels that multiply by packed weights, and of the one that makes ``W_hat`` of them.

    Args:
        bits: width of a code.
        columns: of the weight; `width` is at least that of 16 codes and of a whole number of words.
        together: whether tensor cores multiply.
    """
    width = min((TOGETHER_COLUMNS if together else PRODUCT_COLUMNS)[bits], max(32, power_of_two(columns)))
    return Tile(TOGETHER_ROWS if together else PRODUCT_ROWS[bits], width, 4)


class Parts(NamedTuple):
    """How the columns of a product are divided among programs, whose sums are added afterwards.

    Attributes:
        number: of parts.
        steps: tiles in each of them.
    """

    number: int
    steps: int


def parts_of(columns: int, width: int, programs: int) -> Parts:
    """Parts of `columns`, for enough programs where there are only `programs` without a division."""
    tiles = -(-columns // width)
    count = max(1, min(-(-ENOUGH_PROGRAMS // programs), tiles // FEWEST_STEPS))
    steps = -(-tiles // count)
    return Parts(-(-tiles // steps), steps)


# Numbers of a row that one program has in registers at once: 16 a thread.
NUMBERS_OF_A_THREAD = 16
LONGEST_ROW = 4096
LONGEST_LOGITS = 8192  # since a chunk of tokens has fewer rows than a GPU has multiprocessors, with more threads each


def rows_tile(columns: int) -> Tile:
    """The tile of kernels that look at each row of a matrix as a whole: states, inputs of layers."""
    width = min(LONGEST_ROW, max(32, power_of_two(columns)))
    rows = max(1, 4 * 32 * NUMBERS_OF_A_THREAD // width)
    return Tile(rows, width, max(4, width // (32 * NUMBERS_OF_A_THREAD)))


def logits_tile(vocabulary: int) -> Tile:
    """The tile of kernels that look at the logits of a token; every thread has columns of its own.

    Were there more threads than columns, some would read again what others have written over.
    """
    width = min(LONGEST_LOGITS, max(32 * NUMBERS_OF_A_THREAD, power_of_two(vocabulary)))
    return Tile(1, width, width // (32 * NUMBERS_OF_A_THREAD))


def power_of_two(number: int) -> int:
    """The least power of two that is not below a positive `number`."""
    return 1 << (number - 1).bit_length()
