"""Launch configurations of the attention kernels, by target and head dimension."""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """Queries and keys of a tile, warps, and stages of the pipeline that fetches the next tile."""

    m: int
    n: int
    num_warps: int
    num_stages: int


Table = dict[int, tuple[int, int, int, int]]
"""`Blocks` by the widest head dimension that they are for."""


def _with_descriptors(
    to_64: tuple[int, int, int, int],
    to_128: tuple[int, int, int, int],
    to_256: tuple[int, int, int, int] = (32, 32, 8, 1),
    to_1024: tuple[int, int, int, int] = (16, 16, 8, 1),
) -> dict[str, Table]:
    """Tables of the targets that load tiles by descriptors."""
    table = {64: to_64, 128: to_128, 256: to_256, 1024: to_1024}
    return dict.fromkeys(("sm_90", "sm_100"), table)


# Measured on an H200 (sm_90) for heads of 64 and 128 in 16 bits. All others are not tuned: so that
# tiles fit in shared memory and few registers are spilled.
FORWARD: dict[str, Table] = {
    "sm_80": {64: (128, 32, 4, 3), 128: (128, 32, 8, 3), 256: (64, 32, 8, 2), 1024: (32, 16, 8, 1)},
    "sm_86": {64: (128, 32, 4, 3), 128: (128, 32, 8, 2), 256: (64, 32, 8, 2), 1024: (32, 16, 8, 1)},
    "sm_90": {
        64: (128, 64, 4, 3),
        128: (64, 64, 4, 3),
        256: (64, 32, 8, 2),
        1024: (32, 16, 8, 1),
    },
    "sm_100": {
        64: (128, 64, 8, 2),
        128: (128, 64, 8, 3),
        256: (64, 32, 8, 2),
        1024: (32, 16, 8, 1),
    },
    "gfx942": {
        64: (128, 64, 4, 1),
        128: (128, 64, 8, 1),
        256: (64, 32, 8, 1),
        1024: (32, 16, 8, 1),
    },
}
FORWARD_DESCRIPTORS = _with_descriptors(
    (64, 128, 4, 2), (64, 64, 4, 3), (64, 32, 8, 2), (32, 16, 8, 1)
)
FORWARD_FLOAT32: Table = {
    64: (32, 32, 4, 1),
    128: (32, 32, 8, 1),
    1024: (16, 16, 4, 1),
}
"""float32 is multiplied without tensor cores, and operands take twice the room."""

# Of the backward pass there are two kernels: a program of one holds m queries, one of the other n
# keys, for which it has two sums.
GRAD_QUERIES: dict[str, Table] = {
    "sm_80": {64: (64, 32, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1), 1024: (16, 16, 8, 1)},
    "sm_86": {64: (64, 32, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1), 1024: (16, 16, 8, 1)},
    "sm_90": {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 32, 8, 1), 1024: (16, 16, 8, 1)},
    "sm_100": {64: (32, 64, 4, 2), 128: (32, 64, 8, 2), 256: (32, 32, 8, 1), 1024: (16, 16, 8, 1)},
    "gfx942": {64: (64, 64, 4, 1), 128: (32, 64, 4, 1), 256: (32, 32, 4, 1), 1024: (16, 16, 4, 1)},
}
GRAD_KEYS = GRAD_QUERIES | {
    "sm_90": {64: (64, 64, 4, 3), 128: (64, 128, 8, 2), 256: (32, 32, 8, 1), 1024: (16, 16, 8, 1)},
}
GRAD_QUERIES_DESCRIPTORS = _with_descriptors((64, 64, 4, 3), (128, 64, 8, 3))
GRAD_KEYS_DESCRIPTORS = _with_descriptors((64, 64, 4, 3), (64, 128, 8, 3))
# Going along the heads of a group takes registers, too.
GRAD_KEYS_GROUPED = _with_descriptors((64, 64, 4, 3), (32, 128, 8, 3))
# Beside a bias, slopes or a softcap, which take registers.
GRAD_KEYS_CROWDED = _with_descriptors((32, 64, 4, 2), (32, 64, 8, 2))
BACKWARD_FLOAT32: Table = {64: (32, 32, 8, 1), 1024: (16, 16, 8, 1)}
