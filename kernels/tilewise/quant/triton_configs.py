"""How products with quantized weights are cut into Triton programs: a table per architecture."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tilewise import gpu


class Tile(NamedTuple):
    """A tile of `matmul` and how it is run. BLOCK_K is never less than 128: a chunk of Q6_K."""

    n: int
    m: int
    k: int
    num_warps: int
    num_stages: int


class Config(NamedTuple):
    """The table of an architecture; only that of sm_90 was measured, on an H200, for int4 and int8.

    Args:
        tiles: in ascending order of m; the first that holds all rows of x is taken, or the last.
        packed: the same for `matmul_packed`, whose k is four groups whatever stands here; none
            where it is not for. The tensor cores of sm_100 take no operand from registers, and
            gfx942 has another assembly.
        pair_n: rows of each half of the weight where swiglu needs a pair of sums.
        float32: the tile for float32, which has no tensor cores to feed.
        programs: K is split until there are about so many. A constant, and not the number of
            processors, on which no result may depend.
        packed_programs: the same for `matmul_packed` of up to 32 rows.
        words_rows: how many rows `vector_words` takes.
        vector_rows, narrow_vector_rows: how many rows `vector` takes in float32 and in 16 bits,
            which tensor cores multiply faster however few there are.
        whole: from how many rows the weight is unpacked as a whole.
    """

    tiles: tuple[Tile, ...]
    packed: tuple[Tile, ...]
    pair_n: int
    float32: Tile
    programs: int
    packed_programs: int = 0
    words_rows: int = 0
    vector_rows: int = 4
    narrow_vector_rows: int = 0
    whole: int = 512


_AMPERE = Config(
    tiles=(
        Tile(64, 16, 128, 4, 4),
        Tile(64, 32, 128, 4, 3),
        Tile(64, 64, 128, 4, 3),
        Tile(64, 128, 128, 8, 2),
    ),
    packed=(Tile(64, 16, 0, 4, 3), Tile(64, 32, 0, 4, 3), Tile(64, 64, 0, 4, 2)),
    pair_n=32,
    float32=Tile(32, 32, 128, 4, 1),
    programs=216,
    packed_programs=864,
    words_rows=2,
)
_HOPPER = Config(
    tiles=(
        Tile(128, 16, 128, 4, 3),
        Tile(64, 32, 128, 4, 4),
        Tile(64, 64, 128, 4, 4),
        Tile(128, 128, 128, 8, 3),
    ),
    packed=(
        Tile(64, 16, 0, 4, 3),
        Tile(64, 32, 0, 4, 2),
        Tile(64, 64, 0, 4, 3),
        Tile(128, 128, 0, 8, 2),
    ),
    pair_n=64,
    float32=Tile(32, 32, 128, 4, 1),
    programs=264,
    packed_programs=1056,
    words_rows=2,
    whole=160,
)
CONFIGS = {
    "sm_80": _AMPERE,
    "sm_86": _AMPERE._replace(
        tiles=(
            Tile(64, 16, 128, 4, 4),
            Tile(64, 32, 128, 4, 3),
            Tile(64, 64, 128, 8, 2),
            Tile(64, 128, 128, 8, 2),
        )
    ),
    "sm_90": _HOPPER,
    # With four warps ptxas finds no way to hold all in registers: next to nothing of float32, too
    # little of 128 rows of Q8_0.
    "sm_100": _HOPPER._replace(
        tiles=(Tile(64, 16, 128, 4, 3), *_HOPPER.tiles[1:]),
        float32=Tile(32, 32, 128, 8, 1),
        packed=(),
    ),
    "gfx942": Config(
        tiles=(Tile(64, 16, 128, 4, 2), Tile(64, 32, 128, 4, 2), Tile(64, 64, 128, 4, 2)),
        packed=(),
        pair_n=64,
        float32=Tile(32, 32, 128, 4, 1),
        programs=304,
        narrow_vector_rows=4,
    ),
}


def config(x: torch.Tensor) -> Config:
    """The launch configurations for the GPU of x."""
    return CONFIGS[gpu.architecture(x)]


def tile_for(x: torch.Tensor, rows: int, *, is_pair: bool = False) -> Tile:
    """The tile for a product of so many rows in x's dtype; of a pair of them for swiglu."""
    chosen = config(x)
    if x.dtype == torch.float32:
        return chosen.float32
    tiles = chosen.tiles[:3] if is_pair else chosen.tiles  # two sums are held at once
    tile = next((tile for tile in tiles if tile.m >= rows), tiles[-1])
    return tile._replace(n=chosen.pair_n) if is_pair else tile


def is_vector(x: torch.Tensor, rows: int) -> bool:
    """Whether `vector` takes so few rows of x."""
    chosen = config(x)
    is_float32 = x.dtype == torch.float32
    return rows <= (chosen.vector_rows if is_float32 else chosen.narrow_vector_rows)


def vector_tile(m: int, k: int) -> Tile:
    """Of `vector`: 32 weights for each of 128 threads, or 16 where each meets more rows of x."""
    block_m = 1 << (m - 1).bit_length()
    block_k = next((block for block in (512, 256) if k % block == 0), 128)
    return Tile((4096 if block_m == 1 else 2048) // block_k, block_m, block_k, 4, 1)


def words_tile(m: int, n: int, k: int) -> Tile:
    """Of `vector_words`: whole rows of the weight, if they are no longer than 4096."""
    block_m = 1 << (m - 1).bit_length()
    block_k = min(4096, max(512, 1 << (k - 1).bit_length()))
    return Tile(8 if n >= 4096 else 4, block_m, block_k, 4, 1)


def packed_tile_for(x: torch.Tensor, rows: int, group: int, *, is_pair: bool = False) -> Tile:
    """The tile for `matmul_packed`: four groups deep, as many in flight as there is room for."""
    room = gpu.SHARED_MEMORY[gpu.architecture(x)] - (8 << 10)
    fitting = []
    for tile in config(x).packed[: 3 if is_pair else None]:
        weight = tile.n * (2 * group + 12)
        stage = 8 * group * tile.m + (2 * weight if is_pair else weight)
        if stage <= room:
            stages = min(tile.num_stages, room // stage)
            fitting.append(tile._replace(k=4 * group, num_stages=stages))
    return next((tile for tile in fitting if tile.m >= rows), fitting[-1])


def programs_for(x: torch.Tensor, tile: Tile, *, is_packed: bool) -> int:
    """How many programs K is split for."""
    chosen = config(x)
    return chosen.packed_programs if is_packed and tile.m <= 32 else chosen.programs


def splits_of(m: int, k: int, block_k: int, tiles: int, programs: int) -> int:
    """Into how many parts K is cut: of four blocks at least, and few where a part is large."""
    return max(1, min(programs // max(tiles, 1), k // (4 * block_k), 512 // m))
