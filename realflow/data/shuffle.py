"""A shuffle without state: any place of any epoch can be computed alone, in constant memory."""

from __future__ import annotations

_MASK = (1 << 64) - 1
_ROUNDS = 6


def permute(place: int, size: int, *, seed: int, epoch: int = 0) -> int:
    """Where `place` of `range(size)` goes in the permutation that (seed, epoch) stand for.

    A Feistel network, which is a permutation whatever its round function is, on the smallest even
    number of bits that holds `size`; where it leads out of the range it is applied again until it
    is back inside ("cycle walking", Black and Rogaway 2002), four times on average at most
    (more below 16, where the network keeps 6 bits: on fewer it mixes badly).
    """
    assert 0 <= place < size, (place, size)
    half = max(3, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    key = mix(mix(seed & _MASK) ^ (epoch & _MASK))
    keys = [mix(key + number) for number in range(_ROUNDS)]
    while True:
        left, right = place >> half, place & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        place = left << half | right
        if place < size:
            return place


def mix(value: int) -> int:
    """splitmix64 (Steele, Lea and Flood 2014): each bit of the result depends on all of `value`."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
