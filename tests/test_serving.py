import copy
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from rec.calibration import CalibrationConfig, CalibratorKind, Calibrators
from rec.config import Config, compose
from rec.features import Batch, Encoder
from rec.model import Ranker
from rec.predictions import Rows
from rec.schema import DataConfig, TaskConfig, TaskKind
from rec.serving import Served, inputs_of, to_program
from tests.conftest import CONF, toy_overrides, toy_table

EXPERTS = ["shared_bottom", "omoe", "mmoe", "mixed", "cgc", "ple"]


def config_of(*changes: str) -> Config:
    return compose(toy_overrides(Path("unread"), *changes), config_dir=str(CONF))


def with_tasks(data: DataConfig, tasks: dict[str, TaskConfig]) -> DataConfig:
    data.tasks = tasks
    data.__post_init__()  # checks the funnel
    return data


def batch_of(data: DataConfig, num_rows: int = 50, *, size: int | None = None, seed: int = 7) -> Batch:
    encoder = Encoder(data, labels=False)
    return encoder.collate(encoder.encode(toy_table(num_rows, seed=seed), "the test's rows"), size or num_rows)


def ranker_of(config: Config, *, seed: int = 0) -> Ranker:
    """A network in evaluation mode whose biases are not zero."""
    torch.manual_seed(seed)
    ranker = Ranker(config.model, config.data).eval()
    for name, parameter in ranker.named_parameters():
        if "biases" in name or ".bias" in name:
            torch.nn.init.normal_(parameter)
    return ranker


def auxiliary(data: DataConfig, *names: str) -> DataConfig:
    for name, task in data.tasks.items():
        task.auxiliary = name in names
    return data


def logits_of(ranker: Ranker, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        return ranker(batch).logits


def esm2(*, cart_is_auxiliary: bool = True) -> dict[str, TaskConfig]:
    return {
        "like": TaskConfig(label="click", auxiliary=True),
        "click": TaskConfig(label="click"),
        "cart": TaskConfig(label="purchase", product="click", auxiliary=cart_is_auxiliary),
        "buy": TaskConfig(label="purchase", product="click", via="cart"),
    }


class TestPrune:
    @pytest.mark.parametrize("experts", EXPERTS)
    @pytest.mark.parametrize("gone", [["click"], ["purchase"], ["click", "dwell"]])
    def test_served_logits_keep_every_bit(self, experts: str, gone: list[str]) -> None:
        levels = [1] if experts != "ple" else [2, 3]
        hidden = ["model.experts.gate_layer_sizes=[5]"] if experts != "shared_bottom" else []
        for change in [[], hidden, *([f"model.experts.num_levels={n}"] for n in levels if n > 2)]:
            config = config_of(f"experts={experts}", "data.tasks.purchase.negatives_kept=0.5", *change)
            data = auxiliary(config.data, *gone)
            whole = ranker_of(config)
            pruned = copy.deepcopy(whole)
            pruned.prune(data)
            served = [t for t, name in enumerate(data.tasks) if name not in gone]
            for num_rows in (1, 7, 50, 256):
                batch = batch_of(data, num_rows)
                expected, got = logits_of(whole, batch)[:, served], logits_of(pruned, batch)
                assert expected.abs().min() > 0
                assert torch.equal(got, expected), (num_rows, change)

    @pytest.mark.parametrize("layer_sizes", ["[256,128]", "[33,17]"])
    def test_of_many_tasks_with_many_experts(self, layer_sizes: str) -> None:
        """Wide enough for a sum over experts to be split over lanes of a register."""
        config = config_of(
            "experts=cgc", "model.experts.num_task_experts=3", f"model.experts.layer_sizes={layer_sizes}"
        )
        data = with_tasks(config.data, {f"t{i}": TaskConfig(label="click", auxiliary=i % 3 != 1) for i in range(9)})
        whole = ranker_of(config)
        pruned = copy.deepcopy(whole)
        pruned.prune(data)
        batch = batch_of(data)
        assert torch.equal(logits_of(pruned, batch), logits_of(whole, batch)[:, [1, 4, 7]])
        assert pruned(batch).gate_weights.shape == (50, 3, 3 * 3 + 2)

    @pytest.mark.parametrize("experts", EXPERTS)
    def test_a_task_on_the_way_stays_and_is_no_output(self, experts: str) -> None:
        config = config_of(f"experts={experts}")
        data = with_tasks(config.data, esm2())
        whole = ranker_of(config)
        pruned = copy.deepcopy(whole)
        pruned.prune(data)
        batch = batch_of(data)
        assert torch.equal(logits_of(pruned, batch), logits_of(whole, batch)[:, [1, 3]])
        assert pruned.towers.tower_of == [0, 1, 2, 2]  # of click, cart, buy with and without cart
        assert len(pruned.state_dict()["towers.towers.weights.0"]) == 4

    @pytest.mark.parametrize("experts", EXPERTS)
    def test_nothing_of_the_others_is_left(self, experts: str) -> None:
        """Their numbers are changed to NaN beforehand, wherever the served tasks should not look."""
        config = config_of(f"experts={experts}")
        data = auxiliary(config.data, "click")
        ranker = ranker_of(config)
        before = {name: tensor.numel() for name, tensor in ranker.state_dict().items()}
        for name, parameter in ranker.named_parameters():
            of_click = name.startswith(("towers", "experts.gates")) and len(parameter) == 3
            if of_click or name.startswith(("experts.levels.1.gates", "experts.levels.1.task_experts")):
                parameter.data[0 if of_click or "gates" in name else slice(0, 2)] = torch.nan
            if experts == "cgc" and name.startswith(("experts.levels.0.gates", "experts.levels.0.task_experts")):
                parameter.data[0 if "gates" in name else slice(0, 2)] = torch.nan
        ranker.prune(data)
        after = ranker.state_dict()
        assert not [name for name, tensor in after.items() if not tensor.isfinite().all()]
        assert logits_of(ranker, batch_of(data)).isfinite().all()
        fewer = {name.split(".")[0] for name, tensor in after.items() if tensor.numel() < before[name]}
        assert fewer == ({"towers"} if experts in ("shared_bottom", "omoe") else {"towers", "experts"})

    def test_without_auxiliary_tasks_all_stays(self) -> None:
        config = config_of("experts=ple")
        ranker = ranker_of(config)
        before = {name: tensor.clone() for name, tensor in ranker.state_dict().items()}
        ranker.prune(config.data)
        after = ranker.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)

    def test_training_goes_on_as_batched_products(self) -> None:
        """What evaluation computes network by network, training computes at once: the same but for rounding."""
        config = config_of("experts=mixed")
        ranker, batch = ranker_of(config), batch_of(config.data)
        torch.testing.assert_close(logits_of(ranker, batch), logits_of(ranker.train(), batch), rtol=1e-4, atol=1e-5)


def fitted(data: DataConfig, kind: CalibratorKind) -> Calibrators:
    """Calibrators of the served tasks, fitted to rows of labels that the logits overrate, in each domain otherwise."""
    generator = torch.Generator().manual_seed(3)
    tasks = {name: data.tasks[name] for name in data.served_tasks}
    logits = 2 * torch.randn(3000, len(tasks), generator=generator)
    domain_id = torch.arange(3000) % len(data.domains)
    true = 0.5 * logits - 1 - domain_id.unsqueeze(1)
    labels = (torch.rand(true.shape, generator=generator) < true.sigmoid()).float()
    config = CalibrationConfig(kind=kind, min_positives=20)
    rows = Rows(logits, labels, torch.ones_like(labels), domain_id, domain_id)
    return Calibrators(tasks, domains=data.domains, config=config).fit(rows, split="valid", step=3)


def expected_preds(ranker: Ranker, data: DataConfig, batch: Batch, calibrators: Calibrators | None) -> torch.Tensor:
    """[rows, S], of the whole network."""
    served = [t for t, name in enumerate(data.tasks) if name in data.served_tasks]
    logits = logits_of(ranker, batch)[:, served]
    logits = calibrators(logits, batch.domain_id) if calibrators else logits
    columns = [
        logits[:, i].sigmoid() if data.tasks[name].kind is TaskKind.binary else logits[:, i]
        for i, name in enumerate(data.served_tasks)
    ]
    return torch.stack(columns, dim=1)[: batch.num_rows]


class TestProgram:
    @pytest.mark.parametrize(
        ("changes", "kind"),
        [
            (["experts=mixed", "interaction=dcn_v2", "model.bf16=true"], CalibratorKind.isotonic),
            (["experts=shared_bottom", "interaction=none"], CalibratorKind.platt),
            (["experts=omoe", "model.experts.expert_dropout=0.5", "model.experts.temperature=3"], None),
        ],
    )
    def test_gives_the_network_s_predictions_of_any_number_of_rows(
        self, changes: list[str], kind: CalibratorKind | None
    ) -> None:
        config = config_of("data.tasks.click.positive_weight=4", *changes)
        data = auxiliary(config.data, "purchase")
        ranker = ranker_of(config)
        ranker.bf16 = False
        calibrators = fitted(data, kind) if kind else None
        served = Served(copy.deepcopy(ranker), data, calibrators=calibrators)
        model = to_program(served, num_dense=data.num_dense).module()
        for num_rows in (1, 2, 33):
            batch = batch_of(data, num_rows, size=40)  # the rest is padding
            expected = expected_preds(ranker, data, batch, calibrators)
            got = model(**inputs_of(batch, 40))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            assert got.shape == (num_rows, 2) and not got.requires_grad

    @pytest.mark.parametrize("kept", ["dense", "sparse"])
    def test_data_without_ids_or_without_dense_columns(self, kept: str) -> None:
        config = config_of()
        data = config.data
        data.features = dict(data.dense_features if kept == "dense" else data.sparse_features)
        data.tables = {data.table_of(name): data.tables[data.table_of(name)] for name in data.sparse_features}
        ranker, batch = ranker_of(config), batch_of(data, 9)
        model = to_program(Served(copy.deepcopy(ranker), data, calibrators=None), num_dense=data.num_dense).module()
        expected = expected_preds(ranker, data, batch, None)
        torch.testing.assert_close(model(**inputs_of(batch, 9)), expected, rtol=1e-5, atol=1e-6)

    def test_refuses_what_it_was_not_made_for(self) -> None:
        config = config_of("experts=shared_bottom", "interaction=none")
        data = config.data
        model = to_program(Served(ranker_of(config), data, calibrators=None), num_dense=data.num_dense).module()
        model(**inputs_of(batch_of(data, 4), 4))

        def refused(said: str, **changes: dict | torch.Tensor) -> None:
            inputs = inputs_of(batch_of(data, 4), 4)
            for name, change in changes.items():
                inputs[name] = inputs[name] | change if isinstance(change, dict) else change
            with pytest.raises((RuntimeError, AssertionError), match=said):
                model(**inputs)

        refused(
            r"takes value 997 which is not in the valid range \[0, 997\)", values={"user": torch.tensor([0, 997, 1, 2])}
        )
        refused("takes value -1 which is not in the valid range", values={"user": torch.tensor([0, -1, 1, 2])})
        refused("lengths of 'user' do not add up", lengths={"user": torch.tensor([1, 1, 1, 0])})
        refused(
            "lengths of 'tags' do not add up", values={"tags": torch.arange(11)}, lengths={"tags": torch.ones(4).long()}
        )
        refused("Guard failed: dense", dense=torch.zeros(4, 3))
        refused("Guard failed", domain_id=torch.zeros(3, dtype=torch.int64))

    def test_has_nothing_of_training_in_it(self) -> None:
        config = config_of("experts=mmoe", "model.experts.expert_dropout=0.5", "model.experts.temperature=7")
        data = auxiliary(config.data, "click", "dwell")
        program = to_program(Served(ranker_of(config), data, calibrators=None), num_dense=data.num_dense)
        targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not [target for target in targets if "dropout" in target or "rand" in target or "shift" in target]
        divisors = [node.args[1] for node in program.graph.nodes if "div" in str(node.target)]
        assert 7.0 in divisors
        shapes = {name: tuple(tensor.shape) for name, tensor in program.state_dict.items()}
        assert (
            shapes["ranker.towers.towers.weights.0"][0] == 1 and shapes["ranker.experts.gates.logits.weights.0"][0] == 1
        )
        assert sum(name.startswith("embeddings.tables") for name in shapes) == 4  # item is shared by two features


def test_inputs_of_is_the_columns_row_by_row() -> None:
    data = config_of().data
    rows, num_rows = toy_table(20, seed=7), 6
    inputs = inputs_of(batch_of(data, 20, size=32), num_rows)
    assert inputs["values"]["user"].tolist() == rows["user"].to_pylist()[:num_rows]
    tags = [tags[-3:] for tags in rows["tags"].to_pylist()[:num_rows]]
    assert inputs["lengths"]["tags"].tolist() == [len(row) for row in tags] and [] in tags
    assert inputs["values"]["tags"].tolist() == [tag for row in tags for tag in row]
    assert inputs["dense"].shape == (num_rows, 4) and inputs["lengths"]["user"].dtype == torch.int64
    texts = pa.chunked_array(rows["text"]).to_pylist()[:num_rows]
    torch.testing.assert_close(inputs["dense"][:, 1:], torch.tensor(texts))
    assert len(inputs_of(batch_of(data, 20, size=32), 100)["domain_id"]) == 20
