"""The random numbers of a process, kept as tensors: a run that goes on draws what it would have drawn."""

import json
import random

import numpy as np
import torch
from torch import Tensor


def rng_state() -> dict[str, Tensor]:
    """The state of every generator that this process draws from by default, as uint8 tensors.

    >>> state, drawn = rng_state(), torch.rand(3)
    >>> set_rng_state(state)
    >>> torch.equal(torch.rand(3), drawn)
    True
    """
    kind, keys, *rest = np.random.get_state()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": _bytes([kind, np.asarray(keys).tolist(), *rest]),
        "python": _bytes(random.getstate()),
    }
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_rng_state(state: dict[str, Tensor]) -> None:
    """Go on from a state of `rng_state`; generators that it does not name stay as they are."""
    if "torch" in state:
        torch.set_rng_state(state["torch"])
    if "numpy" in state:
        np.random.set_state(tuple(_value(state["numpy"])))
    if "python" in state:
        version, keys, rest = _value(state["python"])
        random.setstate((version, tuple(keys), rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _bytes(value: object) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(stored: Tensor) -> list:
    return json.loads(bytes(stored.tolist()))
