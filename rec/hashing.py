"""Ids of any kind become 64 random bits: fixed for good, so that serving can repeat them, and all rows at once."""

import numpy as np
import pyarrow as pa
from torch import Tensor

_PRIME = np.uint64(0x100000001B3)  # odd, so it has an inverse modulo 2**64
_PRIME_INVERSE = np.uint64(pow(0x100000001B3, -1, 2**64))


def hash_ints(values: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 over int64 or uint64 values, as uint64 (Steele, Lea and Flood, OOPSLA 2014).

    >>> hash_ints(np.array([1, 2, 3])) % np.uint64(1000)
    array([465, 110,  53], dtype=uint64)
    """
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def mix(ids: Tensor) -> Tensor:
    """The same function on int64 tensors, one to one, on any device: equal hashes are equal ids.

    >>> import torch
    >>> mix(torch.tensor([1, 2, 3])).numpy().view(np.uint64) % np.uint64(1000)
    array([465, 110,  53], dtype=uint64)
    """
    mixed = ids - 0x61C8864680B583EB  # the constants of the paper as signed numbers; int64 wraps around
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15), (31, 1)):
        mixed = (mixed ^ (mixed >> shift & (1 << (64 - shift)) - 1)) * factor
    return mixed


def uniform(keys: Tensor, *, salt: int) -> Tensor:
    """A number in [0, 1) for each key, float32; another one for another `salt`. For draws that no rank may see otherwise.

    >>> import torch
    >>> uniform(torch.tensor([1, 2, 1]), salt=0)
    tensor([0.3682, 0.3922, 0.3682])
    """
    return (mix(mix(keys) + salt) >> 40 & 0xFFFFFF).float() / 2**24


def hash_strings(values: pa.Array) -> np.ndarray:
    """Hash of each string's (or binary's) bytes b_0 .. b_{n-1}: hash_ints(n + sum_i (b_i + 1) * P**i mod 2**64), P = 1099511628211.

    All strings at once: prefix sums over the whole buffer, differences at the offsets, and the powers of P of what came
    before divided out by multiplying with P's inverse. Nulls hash as empty strings.

    >>> hash_strings(pa.array(["query", "listing", "query"])) % np.uint64(1000)
    array([153, 761, 153], dtype=uint64)
    """
    values = values.cast(pa.large_binary())
    values = values.fill_null(b"") if values.null_count else values
    num_values = len(values)
    offsets = np.frombuffer(values.buffers()[1], dtype=np.int64)[values.offset : values.offset + num_values + 1]
    start, stop = (int(offsets[0]), int(offsets[-1])) if num_values else (0, 0)
    data = np.frombuffer(values.buffers()[2] or b"", dtype=np.uint8)[start:stop].astype(np.uint64)
    with np.errstate(over="ignore"):
        powers = np.multiply.accumulate(np.full(len(data) + 1, _PRIME, np.uint64)) * _PRIME_INVERSE
        inverses = np.multiply.accumulate(np.full(len(data) + 1, _PRIME_INVERSE, np.uint64)) * _PRIME
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum((data + np.uint64(1)) * powers[:-1], dtype=np.uint64)])
        first, last = offsets[:-1] - start, offsets[1:] - start
        return hash_ints((sums[last] - sums[first]) * inverses[first] + (last - first).astype(np.uint64))
