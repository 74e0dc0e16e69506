"""Draws from the distribution of the logits alone, in one pass over them.

`Sampler.sample` and `draw` say what is computed: an argmax, a maximum, a sum of exponentials, a cumulative sum and a
search in it. Done one after the other on a GPU they read and write a batch's logits a dozen times. Here every tile of
a row leaves its maximum, where that stands, and its sum; from these few the tile that holds the drawn token is known,
and only it is read again.
"""

from __future__ import annotations

import torch

from ...utils.triton import tl, triton

_TILE = 4096


def draw_from_logits(
    logits: torch.Tensor, temperature: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """What `Sampler.sample` returns where nothing is filtered, but for the rounding of sums.

    Where a uniform number falls between two tokens to the last bit, the two may draw neighbours.

    Args:
        logits: [N, V] of any float dtype, contiguous.
        temperature: float32 [N]; 0 for rows that are greedy.
        seeds, positions: int64 [N].

    Returns:
        int64 [N]. A row without a finite maximum gets the token that holds it.
    """
    num_rows, vocab_size = logits.shape
    num_tiles = triton.cdiv(vocab_size, _TILE)
    largest = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    total = torch.empty_like(largest)
    token_ids = torch.empty(num_rows, num_tiles, dtype=torch.int64, device=logits.device)
    _reduce_kernel[(num_rows, num_tiles)](
        logits, temperature, largest, total, token_ids, vocab_size, num_tiles, TILE=_TILE
    )
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _draw_kernel[(num_rows,)](
        logits, temperature, seeds, positions, largest, total, token_ids, out, vocab_size, num_tiles,
        TILE=_TILE, PADDED_TILES=triton.next_power_of_2(num_tiles),
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _reduce_kernel(  # type: ignore[no-untyped-def]
        logits_ptr, temperature_ptr, largest_ptr, total_ptr, token_ptr, vocab_size, num_tiles, TILE: tl.constexpr
    ):  # fmt: skip
        row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
        token = tile * TILE + tl.arange(0, TILE)
        x = tl.load(logits_ptr + row * vocab_size + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
        x = tl.where(x == x, x, -float("inf"))  # what is not a number is never drawn
        temperature = tl.load(temperature_ptr + row)
        x = x / tl.where(temperature == 0, 1.0, temperature)
        largest, index = tl.max(x, axis=0, return_indices=True)
        reference = tl.where(largest == -float("inf"), 0.0, largest)  # of a tile whose tokens are all forbidden
        tl.store(largest_ptr + row * num_tiles + tile, largest)
        tl.store(total_ptr + row * num_tiles + tile, tl.sum(tl.exp(x - reference), axis=0))
        tl.store(token_ptr + row * num_tiles + tile, (tile * TILE + index).to(tl.int64))

    @triton.jit
    def _mix(x):  # type: ignore[no-untyped-def]
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        return x ^ (x >> 31)

    @triton.jit
    def _draw_kernel(  # type: ignore[no-untyped-def]
        logits_ptr, temperature_ptr, seeds_ptr, positions_ptr, largest_ptr, total_ptr, token_ptr, out_ptr,
        vocab_size, num_tiles, TILE: tl.constexpr, PADDED_TILES: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        tile = tl.arange(0, PADDED_TILES)
        is_tile = tile < num_tiles
        maxima = tl.load(largest_ptr + row * num_tiles + tile, mask=is_tile, other=-float("inf"))
        largest, best_tile = tl.max(maxima, axis=0, return_indices=True)
        greedy = tl.load(token_ptr + row * num_tiles + best_tile)
        temperature = tl.load(temperature_ptr + row)
        if (temperature == 0) | (tl.abs(largest) == float("inf")):
            tl.store(out_ptr + row, greedy)
        else:
            # One uniform number a row: SplitMix64 of seed and position, as `random_uniform` does it.
            seed = tl.load(seeds_ptr + row).to(tl.uint64, bitcast=True)
            position = tl.load(positions_ptr + row).to(tl.uint64, bitcast=True)
            bits = _mix(_mix(seed) + position * 0x9E3779B97F4A7C15)
            uniform = (bits >> 40).to(tl.float32) * 5.9604644775390625e-08  # 2 ** -24

            # In which tile the cumulative weight passes the threshold, and what is left of it there.
            weights = tl.load(total_ptr + row * num_tiles + tile, mask=is_tile, other=0.0) * tl.exp(maxima - largest)
            cumulative = tl.cumsum(weights, axis=0)
            threshold = uniform * tl.sum(tl.where(tile == num_tiles - 1, cumulative, 0.0), axis=0)
            chosen = tl.min(tl.where((cumulative > threshold) & (weights > 0), tile, PADDED_TILES), axis=0)
            chosen = tl.where(chosen == PADDED_TILES, best_tile, chosen)
            threshold -= tl.sum(tl.where(tile == chosen - 1, cumulative, 0.0), axis=0)

            index = tl.arange(0, TILE)
            token = chosen * TILE + index
            x = tl.load(logits_ptr + row * vocab_size + token, mask=token < vocab_size, other=-float("inf"))
            x = x.to(tl.float32)
            weights = tl.exp(tl.where(x == x, x, -float("inf")) / temperature - largest)
            passed = (tl.cumsum(weights, axis=0) > threshold) & (weights > 0)
            first = tl.min(tl.where(passed, index, TILE), axis=0)
            last = tl.max(tl.where(weights > 0, index, 0), axis=0)  # where rounding has left a little too much
            tl.store(out_ptr + row, (chosen * TILE + tl.minimum(first, last)).to(tl.int64))
