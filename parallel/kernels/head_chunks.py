"""How many tokens the fused head takes at a time. Without torch, since estimates of memory need it too."""

WORKSPACE_BYTES = 1_150_000_000
"""Logits of one chunk on a GPU: 4,096 tokens of 139,776 columns in bf16. Every chunk reads and writes the weight's fp32
gradient once, which at 512 tokens costs 34 ms of the 100 ms that the three products of a 1.8B model take on an H100, at
4,096 tokens 4 ms."""
WORKSPACE_BYTES_CPU = 2**28
"""On a CPU, where products reach their speed with fewer rows."""
ROWS = 128
"""Chunks have a multiple of so many rows where they have that many: whole tiles of the matrix products."""


def chunk_rows(tokens: int, columns: int, itemsize: int, workspace_bytes: int) -> int:
    """Tokens of a chunk: as many as the workspace takes, at least one, and in equal chunks.

    `chunk_rows(6000, 139776, 2, 1_150_000_000)` is 3072: two chunks instead of one of 4,096 and a smaller one.
    """
    most = max(1, workspace_bytes // (columns * itemsize))
    tile = ROWS if most >= ROWS else 1
    most -= most % tile
    chunks = max(1, -(-tokens // most))
    rows = -(-tokens // chunks)
    return max(1, rows + -rows % tile)
