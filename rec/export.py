"""Write what a server needs of a run's checkpoint. `python -m rec.export run_dir=DIR`

A folder of three files: `model.pt2`, a program of torch.export that torch alone runs, on plain tensors; `schema.json`, what its
inputs and outputs mean, enough to make them from raw columns; `config.yaml`, the run's configuration. In Python:

    model = torch.export.load("DIR/export/model.pt2").module()
    preds = model(values=values, lengths=lengths, dense=dense, domain_id=domain_id)  # [B, S] float32

With two towers there are two more programs: `item.pt2`, of an item's features alone, gives its vector, which can be computed ahead
of time (`python -m rec.items`); `query.pt2` gives predictions from the query's features and the vectors `items` [B, r]. Together
they are `model.pt2`, and are checked as it is.

Any B from 1 and any number of ids will do. The network is the trained one less what the served tasks do not need, with the
corrections for sampling, the gates' temperature and the calibrators in it, in float32 also where it was trained in bfloat16.
Before the folder appears, a process of its own that knows nothing of this project runs it on rows of a split, and its
predictions must be the trainer's.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rec import config as configuration
from rec import storage
from rec.calibration import Calibrators
from rec.checkpoint import Checkpoints, Info
from rec.config import Config
from rec.data import Reader
from rec.distributed import Rank, process_group, run_entry
from rec.evaluate import Command, calibrators_of, find_checkpoint, restore, split_reader, wants_help
from rec.features import Batch, DataError
from rec.model import Ranker
from rec.predictions import predict
from rec.schema import ConfigError, TaskKind
from rec.serving import Served, describe, inputs_of, to_program
from rec.two_towers import item_width, side_inputs, side_program, sides_of

ABOUT = """Write what a server needs of a run's checkpoint, and check that it says what the trainer says.

    python -m rec.export run_dir=DIR [checkpoint=latest] [out=DIR/export] [key=value ...]

checkpoint   latest, best, or a step
out          folder for model.pt2, schema.json and config.yaml, replaced as a whole; default DIR/export of the run
calibrated   true asks for the calibrators that rec.calibrate kept with the checkpoint, false leaves them out; default: they are
             in where there are any
check_split  split whose first rows the check runs on; default test, or the last split where there is none
key=value    changes the run's configuration, e.g. data.path=DIR

The program takes and gives plain tensors, and torch alone runs it; schema.json says what they mean. Auxiliary tasks are not in
it. Nothing is written unless its predictions agree with the trainer's to 1e-5. Memory: three times the tables."""

SIDES = ("item.pt2", "query.pt2")  # with two towers
FILES = ("config.yaml", "model.pt2", "schema.json", *SIDES)
TOLERANCE = 1e-5  # of a probability; of a prediction beyond 1, relative
_CHECK_ROWS, _CHECK_STEPS = 1024, 4  # rows a step
_TIMED_ROWS = (1, 256)


def load_served(config: Config, path: Path, *, calibrated: bool) -> Served:
    """The network of the checkpoint `path`, whatever number of ranks wrote it, as it is served."""
    data = config.data
    ranker = Ranker(config.model, data)
    Checkpoints(path.parent, config.checkpoint).load(path, {"model": ranker.state_dict()})  # fills them in place
    tasks = {name: data.tasks[name] for name in data.served_tasks}
    calibrators = Calibrators.load(path, tasks, domains=data.domains) if calibrated else None
    return Served(ranker, data, calibrators=calibrators)


# ---- the check


@dataclass
class CheckRows:
    """Rows as the program takes them, and the trainer's predictions of them.

    Attributes:
        inputs: batches of inputs, see `Served.forward`.
        timed: number of rows -> inputs of so many, or of all where there are fewer.
        preds: [R, S] float32, of all batches.
        rounding: largest difference that computing in bfloat16 makes to `preds`; None unless the run does.
        sides: batches of inputs of the item's and of the query's side; empty without two towers.
    """

    inputs: list[dict[str, Any]]
    timed: dict[int, dict[str, Any]]
    preds: Tensor
    rounding: float | None = None
    sides: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)


@dataclass
class Ran:
    """What the programs said of `CheckRows`: preds [R, S], and milliseconds (median of 20) by number of rows.

    With two towers, `of_sides` [R, S] is what the two sides said together.
    """

    preds: Tensor
    milliseconds: dict[int, float]
    of_sides: Tensor | None = None


def collect_rows(config: Config, rank: Rank, path: Path, reader: Reader, *, wanted: str) -> CheckRows:
    """The first rows of a split through the trainer's network, sharded, with all its tasks, and its calibrators."""
    data = config.data
    calibrators = calibrators_of(path, data, rank, wanted=wanted)
    model = restore(config, rank, path, local_batch_size=reader.local_batch_size).model
    ranker = next(module for module in model.modules() if isinstance(module, Ranker))
    tasks = [t for t, task in enumerate(data.tasks.values()) if not task.auxiliary]
    binary = torch.tensor([data.tasks[name].kind is TaskKind.binary for name in data.served_tasks])

    def run(bf16: bool) -> tuple[list[Batch], Tensor]:
        ranker.bf16 = bf16
        batches, preds = [], []
        for predicted in predict(model, reader, device=rank.device, max_steps=_CHECK_STEPS, calibrators=calibrators):
            logits = predicted.logits[: predicted.batch.num_rows, tasks]
            batches.append(predicted.batch)
            preds.append(torch.where(binary, logits.sigmoid(), logits))
        return batches, torch.cat(preds)

    batches, preds = run(False)
    rounding = (run(True)[1] - preds).abs().max().item() if config.model.bf16 else None
    timed = {num_rows: inputs_of(batches[0], num_rows) for num_rows in _TIMED_ROWS}
    return CheckRows([inputs_of(batch, batch.num_rows) for batch in batches], timed, preds, rounding)


_PROGRAM = """
import json, statistics, sys, time
import torch

def timed(inputs):
    def once():
        started = time.perf_counter()
        model(**inputs)
        return 1000 * (time.perf_counter() - started)
    once()
    return statistics.median(once() for _ in range(20))

folder, given, got = sys.argv[1:]
model = torch.export.load(folder + "/model.pt2").module()
rows = torch.load(given, weights_only=True)
with torch.no_grad():
    preds = {"preds": torch.cat([model(**inputs) for inputs in rows["inputs"]])}
    if rows["sides"]:
        item, query = (torch.export.load(f"{folder}/{side}.pt2").module() for side in ("item", "query"))
        preds["of_sides"] = torch.cat([query(**second, items=item(**first)) for first, second in rows["sides"]])
    torch.save(preds, got)
    print(json.dumps({num_rows: timed(inputs) for num_rows, inputs in rows["timed"].items()}))
foreign = {"rec", "torchrec", "fbgemm_gpu"} & {name.split(".")[0] for name in sys.modules}
assert not foreign, foreign
"""


def run_alone(programs: Path, rows: CheckRows) -> Ran:
    """Run the programs in a folder in a process of its own, with torch alone.

    Raises:
        ConfigError: it does not run there.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, got = Path(folder, "rows.pt"), Path(folder, "preds.pt")
        torch.save({"inputs": rows.inputs, "timed": rows.timed, "sides": rows.sides}, given)
        command = [sys.executable, "-I", "-c", _PROGRAM, str(programs), str(given), str(got)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(
                f"the exported program does not run with torch alone, so nothing was written:\n{done.stderr[-4000:]}"
            )
        milliseconds = {int(num_rows): median for num_rows, median in json.loads(done.stdout).items()}
        return Ran(**torch.load(got, weights_only=True), milliseconds=milliseconds)


def largest_difference(preds: Tensor, expected: Tensor, *, tasks: list[str]) -> float:
    """Between predictions [R, S] of the program and of the trainer; of those beyond 1, relative.

    Raises:
        ConfigError: it is above `TOLERANCE`, or not a number.
    """
    difference = ((preds - expected).abs() / expected.abs().clamp(min=1)).nan_to_num(torch.inf)
    worst = int(difference.argmax())
    row, task = divmod(worst, len(tasks))
    if difference[row, task] > TOLERANCE:
        raise ConfigError(
            f"the exported program gives {preds[row, task]:.7g} for task '{tasks[task]}' in row {row} of the check, the trainer "
            f"{expected[row, task]:.7g}, expected the same to {TOLERANCE:g}, so nothing was written; the checkpoint was changed "
            "meanwhile, its weights are not finite, or rec.export has a fault"
        )
    return difference[row, task].item()


# ---- the folder and the command line


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A hidden folder to write into, which takes the place of `folder` at the end, unless there was an exception.

    In a store files come one after another: the export is whole when its `schema.json` is there.

    Raises:
        ConfigError: `folder` holds something else than an export.
    """
    others = sorted({path.name for path in folder.iterdir()} - {*FILES}) if folder.is_dir() else []
    if others or (folder.exists() and not folder.is_dir()):
        raise ConfigError(
            f"out={folder} is or holds something else than an export ({', '.join(others[:3]) or 'a file'}), which would be "
            "lost; choose a folder that is new, empty or holds an export"
        )
    if not storage.is_local(folder):
        with tempfile.TemporaryDirectory(prefix="rec_") as local, storage.named(folder):
            yield Path(local)
            storage.put_folder(Path(local), folder, last="schema.json")
        return
    draft, old = (folder.with_name(f".{state}_{folder.name}") for state in ("writing", "dropping"))
    shutil.rmtree(draft, ignore_errors=True)  # what a kill left behind
    draft.mkdir(parents=True)
    try:
        yield draft
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    draft.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def export_run(command: Command, config: Config, rank: Rank) -> None:
    """Write, check, publish, say."""
    data, wanted = config.data, command.own["calibrated"]
    split = command.own["check_split"] or ("test" if "test" in data.splits else [*data.splits][-1])
    folder = storage.path(command.own["out"] or command.run_dir / "export").absolute()
    few = replace(config.reader, global_batch_size=_CHECK_ROWS, shuffle_rows=_CHECK_ROWS)  # no more are decoded
    reader = split_reader(replace(config, reader=few), rank, split, labels=False)
    path = find_checkpoint(config, command.run_dir, command.own["checkpoint"])
    calibrated = calibrators_of(path, data, rank, wanted=wanted) is not None
    with replacing(folder) as draft:
        served = load_served(config, path, calibrated=calibrated)
        torch.export.save(to_program(served, num_dense=data.num_dense), draft / "model.pt2")
        sides = sides_of(served, data)
        for name, side in zip(SIDES, sides, strict=False):
            torch.export.save(side_program(side, item_width=item_width(config.model)), draft / name)
        types = next(iter(reader.split.schemas.values()))
        said = describe(config, types=types, info=Info.read(path), path=path, calibrators=served.calibrators)
        rows = collect_rows(config, rank, path, reader, wanted=wanted)
        if sides:
            item, query = sides
            rows.sides = [(side_inputs(item, inputs), side_inputs(query, inputs)) for inputs in rows.inputs]
            del item, query
        del served, sides
        ran = run_alone(draft, rows)
        difference = largest_difference(ran.preds, rows.preds, tasks=data.served_tasks)
        if ran.of_sides is not None:
            difference = max(difference, largest_difference(ran.of_sides, rows.preds, tasks=data.served_tasks))
        said["check"] = {"split": split, "rows": len(rows.preds), "max_difference": difference}
        (draft / "schema.json").write_text(json.dumps(said, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (draft / "config.yaml").write_text(configuration.to_yaml(config), encoding="utf-8")
    print(_report(folder, said, rows, ran), flush=True)


def _report(folder: Path, said: dict[str, Any], rows: CheckRows, ran: Ran) -> str:
    network, calibration = said["network"], said["calibration"]
    times = ", ".join(
        f"{median:.2f} ms for {len(rows.timed[num_rows]['domain_id'])} row{'s' * (num_rows > 1)}"
        for num_rows, median in ran.milliseconds.items()
    )
    lines = [
        f"{said['checkpoint']['name']}: {', '.join(said['tasks'])}, "
        + (f"calibrated on {calibration['fitted_on']['split']}" if calibration else "not calibrated"),
        f"left out: {', '.join(network['pruned'])}" if network["pruned"] else "",
        f"as the trainer to {said['check']['max_difference']:.1e} on {len(rows.preds):,} rows of {said['check']['split']}",
        f"float32; the run computes in bfloat16, which differs by up to {rows.rounding:.1e}" if rows.rounding else "",
        f"{times} on this machine's CPU; {(folder / 'model.pt2').stat().st_size / 2**20:.1f} MiB",
        str(folder),
    ]
    return "\n".join(line for line in lines if line)


def command_of(arguments: Sequence[str]) -> Command:
    """The command line of an export."""
    defaults = {"checkpoint": "latest", "out": "", "calibrated": "auto", "check_split": ""}
    return Command.parse(arguments, defaults=defaults, purpose="export")


def run(arguments: list[str]) -> None:
    """Read the run's configuration, be the only rank, export."""
    if wants_help(arguments):
        print(ABOUT)
        return
    command = command_of(arguments)
    config = command.config()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "rec.export is one process, whatever wrote the checkpoint; start it with python, not torchrun"
        )
    with process_group(timeout_s=config.trainer.timeout_s):
        export_run(command, config, Rank(0, 1, torch.device("cpu")))


def main() -> None:
    """The command line."""
    run_entry(lambda: run(sys.argv[1:]), quiet=(ConfigError, DataError))


if __name__ == "__main__":
    main()
