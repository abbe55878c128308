import random

import numpy as np
import torch

from rec.rng import rng_state, set_rng_state


def draws() -> list[float]:
    return [torch.rand(1).item(), float(np.random.rand()), random.random()]


def test_goes_on_where_it_was() -> None:
    draws()
    state = rng_state()
    expected = [draws(), draws()]
    set_rng_state(state)
    assert [draws(), draws()] == expected
    assert all(value.dtype == torch.uint8 and value.ndim == 1 for value in state.values())


def test_what_is_not_named_stays() -> None:
    state = rng_state()
    first = draws()
    set_rng_state({"torch": state["torch"]})
    second = draws()
    assert second[0] == first[0] and second[1] != first[1] and second[2] != first[2]
