import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from rec import predict as prediction
from rec.calibration import Calibrators
from rec.config import load
from rec.distributed import process_group
from rec.evaluate import find_checkpoint, restore, split_reader
from rec.features import DataError
from rec.schema import ConfigError
from tests.test_calibrate import STEP, calibrate, evaluate, run_dir, trained  # noqa: F401 (fixtures)
from tests.test_checkpoint import one_process


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with one_process():
        yield


def predict(run_dir: Path, *arguments: str, folder: str = "predictions/test") -> pa.Table:  # noqa: F811
    """The predictions that a run gives, in the order of the rows."""
    prediction.run([f"run_dir={run_dir}", *arguments])
    return pq.read_table(run_dir / folder).sort_by("row")


def forward(run_dir: Path, *, calibrated: bool) -> np.ndarray:  # noqa: F811
    """Logits [R, T] of the test split, row by row of the files."""
    config = load(run_dir / "config.yaml")
    path = find_checkpoint(config, run_dir, "latest")
    calibrators = Calibrators.load(path, config.data.tasks, domains=config.data.domains)
    with process_group() as rank, torch.no_grad():
        reader = split_reader(config, rank, "test")
        model = restore(config, rank, path, local_batch_size=reader.local_batch_size).model.eval()
        found = np.zeros((reader.num_rows, len(config.data.tasks)), np.float32)
        for batch in reader.batches():
            logits = model(batch).logits
            if calibrated:
                assert calibrators is not None
                logits = calibrators(logits, batch.domain_id)
            found[batch.row_id[: batch.num_rows]] = logits[: batch.num_rows]
    return found


@pytest.mark.parametrize("calibrated", [True, False])
def test_row_for_row_what_the_network_gives(run_dir: Path, calibrated: bool) -> None:  # noqa: F811
    with one_process():
        calibrate(run_dir)
    with one_process():
        got = predict(run_dir, *([] if calibrated else ["calibrated=false"]))
    with one_process():
        want = forward(run_dir, calibrated=calibrated)
    assert json.loads(got.schema.metadata[b"rec"])["calibrated"] is calibrated
    for t, task in enumerate(("click", "purchase", "dwell")):
        np.testing.assert_allclose(got[f"{task}.logit"], want[:, t], rtol=1e-5, atol=1e-6)


def test_are_what_an_evaluation_measures(run_dir: Path) -> None:  # noqa: F811
    with one_process():
        event = evaluate(run_dir, "predictions=true")
    table = pq.read_table(run_dir / "predictions" / "test")
    pred, label, weight = (np.array(table[f"purchase.{part}"]).astype(float) for part in ("pred", "label", "weight"))
    loss = -np.average(label * np.log(pred) + (1 - label) * np.log1p(-pred), weights=weight)
    assert event["metrics"]["purchase"]["logloss"] == pytest.approx(loss, rel=1e-5)
    assert event["metrics"]["purchase"]["rows"] == int((weight > 0).sum())


def test_files_without_labels(run_dir: Path, tmp_path: Path) -> None:  # noqa: F811
    config = load(run_dir / "config.yaml")
    with one_process():
        want = predict(run_dir)
    bare = tmp_path / "bare" / "valid"
    bare.mkdir(parents=True)
    for file in sorted((Path(config.data.path) / "valid").iterdir()):
        pq.write_table(pq.read_table(file).drop_columns(["click", "purchase", "dwell", "trust"]), bare / file.name)
    elsewhere = [f"data.path={tmp_path}/bare", f"out={tmp_path}/out"]
    with one_process():
        got = predict(run_dir, *elsewhere, "labels=false", folder=f"{tmp_path}/out")
    shown = [f"{task}.{part}" for task in ("click", "purchase", "dwell") for part in ("logit", "pred")]
    assert got.column_names == ["row", "domain", "group", *shown]
    assert got.equals(want.select(got.column_names))
    with one_process(), pytest.raises(DataError, match="column 'click' is missing"):
        predict(run_dir, *elsewhere)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["labels=no"], "labels is 'no', expected true or false"),
        (["calibrated=true"], f"calibrated=true, and .*{STEP} has no calibration.json; fit calibrators first"),
        (["split=tset"], "no split 'tset': did you mean 'test'"),
        (["output=x"], "no setting 'output'"),
        (["out={run_dir}"], "out=.*run holds checkpoints, .* would be lost"),
    ],
)
def test_refused(run_dir: Path, arguments: list[str], said: str) -> None:  # noqa: F811
    before = sorted(run_dir.rglob("*"))
    with pytest.raises(ConfigError, match=said):
        predict(run_dir, *[argument.format(run_dir=run_dir) for argument in arguments])
    assert sorted(run_dir.rglob("*")) == before


def test_no_run_dir() -> None:
    with pytest.raises(ConfigError, match="run_dir=DIR is missing: the folder of the run to predict with"):
        prediction.run(["split=valid"])
