"""Every number drawn at random, each from the key that names it.

Knows keys and uniform numbers; nothing of tokens, rewards or devices. A number follows from
its key alone, so it does not depend on the order of the draws, on the machine, on the number of
candidates drafted at once or on who shares a round.

Source:
    Counter-based random numbers (Salmon et al., SC 2011), here with BLAKE2b as the keyed function.
"""

import hashlib
import os
import struct

_UNIFORMS_PER_BLOCK = 8
_PACK = struct.Struct("<Qqqq")
_BLOCK = struct.Struct("<8Q")
_SEED_MASK = (1 << 64) - 1


def new_seed() -> int:
    """Return a seed, in [0, 2**63), that no one can foresee."""
    return int.from_bytes(os.urandom(8), "little") >> 1


def uniforms(
    purpose: bytes, count: int, seed: int, segment: int = 0, attempt: int = 0
) -> list[float]:
    """Return the first `count` uniform numbers, in (0, 1], of a key.

    Args:
        purpose: What the numbers are for, at most 16 bytes; different purposes share nothing.
        count: How many; the numbers at positions 0, 1, ... do not depend on it.
        seed: Seed of the request; taken modulo 2**64.
        segment: Index of the segment.
        attempt: Number of the attempt.
    """
    numbers: list[float] = []
    for block in range((count + _UNIFORMS_PER_BLOCK - 1) // _UNIFORMS_PER_BLOCK):
        digest = hashlib.blake2b(
            _PACK.pack(seed & _SEED_MASK, segment, attempt, block), digest_size=64, person=purpose
        ).digest()
        numbers += [((word >> 11) + 1) * 2.0**-53 for word in _BLOCK.unpack(digest)]
    return numbers[:count]


def drafting_uniforms(count: int, *, seed: int, segment: int, attempt: int) -> list[float]:
    """Return the numbers, in (0, 1], that pick the tokens of one attempt, by position."""
    return uniforms(b"draft", count, seed, segment, attempt)


def acceptance_uniform(*, seed: int, segment: int, attempt: int) -> float:
    """Return the number u, in (0, 1], that decides on one attempt."""
    return uniforms(b"accept", 1, seed, segment, attempt)[0]


def fallback_uniform(*, seed: int, segment: int, attempt: int, draw: int = 0) -> float:
    """Return the number, in (0, 1], that draws from the pool once `attempt` attempts are spent.

    Where the segment is taken back and nothing else is left for it, the pool is drawn from anew:
    `draw` tells the draws apart.
    """
    return uniforms(b"fallback", draw + 1, seed, segment, attempt)[draw]
