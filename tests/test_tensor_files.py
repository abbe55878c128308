from pathlib import Path

import pytest
import torch

from rec.distributed import process_group
from rec.tensor_files import damage, read, sizes, staged, write
from tests.test_checkpoint import one_process


def test_what_is_staged_stays_as_it_was() -> None:
    state = {"a": torch.ones(3), "b": {"c": torch.zeros(2, 2)}}
    copied = staged(state)
    state["a"].fill_(5)
    state["b"]["c"].add_(1)
    assert copied["a"].tolist() == [1.0] * 3 and copied["b"]["c"].tolist() == [[0.0, 0.0]] * 2


def test_written_is_read_and_its_shapes_are_known(tmp_path: Path) -> None:
    with one_process(), process_group():
        group = torch.distributed.new_group(backend="gloo")
        sums = write({"a": torch.arange(3.0), "b": {"c": torch.ones(2, 1)}}, tmp_path, group=group)
        assert sizes(tmp_path) == {"a": (3,), "b.c": (2, 1)}
        state = {"b": {"c": torch.zeros(2, 1)}}
        read(state, tmp_path)  # a part of it
        assert state["b"]["c"].tolist() == [[1.0], [1.0]]
    assert sums.keys() == {path.name for path in tmp_path.iterdir()}
    assert damage(tmp_path, sums, sums) is None


@pytest.mark.parametrize("change", ["bit", "gone"])
def test_damage_is_named(tmp_path: Path, change: str) -> None:
    with one_process(), process_group():
        sums = write({"a": torch.arange(3.0)}, tmp_path, group=torch.distributed.new_group(backend="gloo"))
    file = tmp_path / "__0_0.distcp"
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])
    why = damage(tmp_path, sums, sorted(sums))
    assert why is not None and why.startswith("__0_0.distcp ")
    assert ("cannot be read" in why) == (change == "gone")
    assert damage(tmp_path, sums, [".metadata"]) is None
