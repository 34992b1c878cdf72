"""Add rows to the rows of a table that their indices name, as a Triton kernel: the gradient of a look-up.

Each row of the table is summed in float32, in the order of the tokens, by one program that rounds once: the same inputs
give the same bits.

Shapes: V rows of the table, T tokens, D numbers of a row.
"""

import triton
import triton.language as tl
from torch import Tensor


def add_rows(table_VD: Tensor, index_T: Tensor, rows_TD: Tensor) -> None:
    """Add each token's row to the table in place; those with a negative index are left out."""
    rows_TD = rows_TD.contiguous()
    index, order = index_T.sort(stable=True)
    tokens, width = rows_TD.shape
    block = min(1024, triton.next_power_of_2(width))
    add_up_rows[(tokens, triton.cdiv(width, block))](
        table_VD, index, order, rows_TD, tokens, width, BLOCK=block, num_warps=4
    )


@triton.jit
def add_up_rows(table, index, order, rows, tokens, width, BLOCK: tl.constexpr):
    """Sum the tokens of one index, if it is the first of them that the program stands at."""
    first, at = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(index + first)
    is_first = (own >= 0) & (tl.load(index + first - 1, mask=first > 0, other=-1) != own)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    place, more = first, is_first
    while more:
        row = tl.load(order + place)
        total += tl.load(rows + row * width + at, mask=at < width, other=0.0).to(tl.float32)
        place += 1
        more = tl.load(index + place, mask=place < tokens, other=-1) == own
    there = table + own.to(tl.int64) * width + at
    mask = is_first & (at < width)
    total += tl.load(there, mask=mask, other=0.0).to(tl.float32)
    tl.store(there, total.to(table.dtype.element_ty), mask=mask)
