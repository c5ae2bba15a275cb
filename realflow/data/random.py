"""Random numbers that belong to a sample, not to a rank: a counter-based generator without state.

Philox 4x32 with 10 rounds (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as
1, 2, 3", SC 2011): the draw is a bijection of its counter under a key. Here the key is the run's
seed and the counter is (token position, turn, sample id), so that a draw depends on nothing else.
"""

from __future__ import annotations

import numpy as np
import torch

_ROUNDS = 10
_MULTIPLY = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)

Words = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def philox(counter: Words, key: tuple[int, int]) -> Words:
    """Philox4x32-10 of four counter words under two key words.

    Counter words are uint64 arrays of one shape whose values are below 2**32; so are the results.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        p0, p1 = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]  # 32 x 32 bits fit into 64
        c0, c1, c2, c3 = (
            (p1 >> _HALF) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _HALF) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _WEYL[0]) & 0xFFFFFFFF, (k1 + _WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(
    seed: int,
    sample_ids: torch.Tensor | int,
    turn: int,
    positions: torch.Tensor | int,
) -> torch.Tensor:
    """Uniform numbers in [0, 1), 53 bits each, one for every (seed, sample id, turn, position).

    `sample_ids` (below 2**63) and `positions` (below 2**32; the index of the drawn token in the
    sample's tokens) are int64 tensors or ints and broadcast against each other; `turn` is below
    2**32. Returns float64 of the broadcast shape, on the CPU.
    """
    ids, places = np.broadcast_arrays(_words(sample_ids), _words(positions))
    assert 0 <= turn < 2**32, turn
    assert not places.size or int(places.max()) < 2**32, "positions must be below 2**32"
    counter = (places, np.full_like(places, turn), ids & _LOW, ids >> _HALF)
    high, low, _, _ = philox(counter, (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    bits = ((high >> np.uint64(5)) << np.uint64(26)) | (low >> np.uint64(6))
    return torch.from_numpy(np.asarray(bits.astype(np.float64) * 2.0**-53))


def _words(value: torch.Tensor | int) -> np.ndarray:
    array = np.asarray(value.cpu().numpy() if isinstance(value, torch.Tensor) else value, dtype=np.int64)
    assert not array.size or int(array.min()) >= 0, "sample ids and positions are never negative"
    return array.astype(np.uint64)
