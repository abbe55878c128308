import copy
import dataclasses
from itertools import chain

import numpy as np
import pytest
import torch
from torch.export import Dim

from rec.domain_experts import (
    DOMAIN_EXPERTS,
    MTMD,
    Adaptation,
    GateUnit,
    MTMDConfig,
    PEPNet,
    PEPNetConfig,
    Star,
    StarConfig,
)
from rec.hashing import uniform
from rec.mixtures import ExpertInputs, Experts, ExpertsConfig, Mixture, Sizes
from rec.schema import ConfigError
from tests.test_experts import draws, softmax
from tests.test_stacked import mlp

WIDTH, TASKS, DOMAINS = 7, 3, 4
SIZES = Sizes(in_features=WIDTH, num_tasks=TASKS, num_domains=DOMAINS)
CONFIGS = {
    "star": StarConfig(layer_sizes=[6, 5]),
    "pepnet": PEPNetConfig(layer_sizes=[6, 5], gate_size=4, domain_dim=3),
    "mtmd": MTMDConfig(layer_sizes=[6, 5], num_domain_experts=2, num_task_experts=3, gate_layer_sizes=[4]),
}
KINDS = pytest.mark.parametrize("kind", list(CONFIGS))


def make(config: ExpertsConfig, sizes: Sizes = SIZES, *, seed: int = 0) -> Experts:
    """A kind in evaluation mode, all of whose parameters are random."""
    torch.manual_seed(seed)
    module = DOMAIN_EXPERTS[type(config)](config, sizes).eval()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module


def mtmd(**changes) -> MTMD:
    return make(changed("mtmd", **changes))


def rows(domains: list[int], *, seed: int = 1, gate_width: int | None = None) -> ExpertInputs:
    torch.manual_seed(seed)
    gate_x = None if gate_width is None else torch.randn(len(domains), gate_width)
    x = torch.randn(len(domains), WIDTH)
    return ExpertInputs(x, draws(len(domains), step=seed), gate_x, torch.tensor(domains))


def changed(kind: str, **of_mtmd) -> ExpertsConfig:
    return dataclasses.replace(CONFIGS[kind], **(of_mtmd if kind == "mtmd" else {}))


def total(mixture: Mixture) -> torch.Tensor:
    penalty = 0 if mixture.row_penalty is None else mixture.row_penalty.sum()
    return mixture.values.square().sum() + penalty


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


# ---- each kind on one row, in numpy


def star_by_loops(module: Star, x: np.ndarray, d: int) -> np.ndarray:
    normal = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
    scale, offset = array(module.norm.weight), array(module.norm.bias)
    if 0 <= d < DOMAINS:
        scale, offset = scale * array(module.domain_scales)[d], offset + array(module.domain_offsets)[d]
    x = normal * scale + offset
    for layer in module.layers:
        weight, bias = array(layer.weight), array(layer.bias)
        if 0 <= d < DOMAINS:
            weight, bias = weight * array(layer.domain_weights)[d], bias + array(layer.domain_biases)[d]
        x = np.maximum(0, [x @ weight[:, o] + bias[o] for o in range(len(bias))])
    return np.stack([x] * TASKS)


def gate_unit(unit: GateUnit, x: np.ndarray, index: int) -> np.ndarray:
    return 2 / (1 + np.exp(-mlp(mlp(x, unit.hidden, 0), unit.out, index)))


def pepnet_by_loops(module: PEPNet, x: np.ndarray, d: int, gate_x: np.ndarray | None = None) -> np.ndarray:
    embeddings = array(module.domain_embeddings)
    domain = embeddings[d] if 0 <= d < len(embeddings) else np.zeros(embeddings.shape[1])
    scaled = gate_unit(module.embedding_gate, np.concatenate([domain, x]), 0) * x
    prior = domain if gate_x is None else np.concatenate([domain, gate_x])
    values = []
    for t in range(TASKS):
        hidden = scaled
        for gate, layer in zip(module.gates, module.layers, strict=True):
            hidden = mlp(gate_unit(gate, np.concatenate([prior, scaled]), t) * hidden, layer, t)
        values.append(hidden)
    return np.stack(values)


def mtmd_by_loops(module: MTMD, x: np.ndarray, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Values [T, H], gate_weights [T, N], expert_outputs [N, H]."""
    s, n, m = module.nums
    shared = [mlp(x, module.shared_experts.stacks[0], i) for i in range(s)]
    plain = [[mlp(x, module.domain_experts.stacks[0], j * n + i) for i in range(n)] for j in range(DOMAINS)]
    of_task = [[mlp(x, module.task_experts.stacks[0], t * m + i) for i in range(m)] for t in range(TASKS)]
    adapted = plain
    if module.config.adaptation is not Adaptation.none:
        mixing = [softmax(row) for row in array(module.adaptation)]
        adapted = [[sum(mixing[e][j] * plain[j][i] for j in range(DOMAINS)) for i in range(n)] for e in range(DOMAINS)]
    outputs = np.stack([*shared, *chain(*adapted), *chain(*of_task)])
    values, weights = [], np.zeros((TASKS, len(outputs)))
    for t in range(TASKS):
        of_domain, of_t = [s + d * n + i for i in range(n)], [s + DOMAINS * n + t * m + i for i in range(m)]
        if 0 <= d < DOMAINS:
            reach, scores = [*range(s), *of_domain, *of_t], mlp(x, module.gates.logits, d * TASKS + t)
        else:
            reach, scores = [*range(s), *of_t], mlp(x, module.fallback_gates.logits, t)
            scores = np.concatenate([scores[:s], scores[s + n :]])
        weights[t, reach] = softmax(scores / module.config.temperature)
        values.append(sum(weights[t, i] * outputs[i] for i in reach))
    return np.stack(values), weights, outputs


EVERY = [2, 0, -1, 3, 1, 2, DOMAINS, 0, 2**40, -7]  # unknown ones among them


@pytest.mark.parametrize("domains", [EVERY, [1], [-1]], ids=["mixed", "one row", "one unknown row"])
class TestAgainstLoops:
    def test_star(self, domains: list[int]) -> None:
        module, inputs = make(CONFIGS["star"]), rows(domains)
        expected = [star_by_loops(module, x, d) for x, d in zip(inputs.x.numpy(), domains, strict=True)]
        np.testing.assert_allclose(array(module(inputs).values), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("gate_width", [None, 2])
    def test_pepnet(self, domains: list[int], gate_width: int | None) -> None:
        module = make(CONFIGS["pepnet"], dataclasses.replace(SIZES, gate_features=gate_width))
        inputs = rows(domains, gate_width=gate_width)
        gate_xs = [None] * len(domains) if inputs.gate_x is None else inputs.gate_x.numpy()
        expected = [pepnet_by_loops(module, *row) for row in zip(inputs.x.numpy(), domains, gate_xs, strict=True)]
        np.testing.assert_allclose(array(module(inputs).values), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("adaptation", list(Adaptation))
    def test_mtmd(self, domains: list[int], adaptation: Adaptation) -> None:
        module, inputs = mtmd(adaptation=adaptation, temperature=2.0), rows(domains)
        mixture = module(inputs)
        found = zip(*(mtmd_by_loops(module, *row) for row in zip(inputs.x.numpy(), domains, strict=True)), strict=True)
        got = (mixture.values, mixture.gate_weights, mixture.expert_outputs)
        for tensor, expected in zip(got, found, strict=True):
            np.testing.assert_allclose(array(tensor), np.stack(expected), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mixture.gate_weights.sum(-1), torch.ones(len(domains), TASKS))
        assert mixture.row_penalty is None

    def test_training_computes_the_same(self, domains: list[int]) -> None:
        for kind in CONFIGS:
            module, inputs = make(changed(kind, unknown_share=0.0)), rows(domains)
            expected = module(inputs).values
            torch.testing.assert_close(module.train()(inputs).values, expected, rtol=1e-4, atol=1e-5)


# ---- what every kind keeps to


@KINDS
def test_one_domain_and_no_domain_at_all(kind: str) -> None:
    module, inputs = make(CONFIGS[kind], dataclasses.replace(SIZES, num_domains=1)), rows([0] * 5)
    whole = module(inputs).values
    assert whole.shape == (5, TASKS, 5) and whole.isfinite().all()
    assert torch.equal(module(ExpertInputs(inputs.x, inputs.draws)).values, whole)


@pytest.mark.parametrize("adversarial_loss", [0.0, 2.0])
@KINDS
def test_rows_do_not_see_one_another_even_in_training(kind: str, adversarial_loss: float) -> None:
    """Two ranks with some of the rows each say and learn what one rank with all of them does."""
    config = changed(kind, adversarial_loss=adversarial_loss, unknown_share=0.3, expert_dropout=0.2)
    module = make(config).train()
    inputs = rows([0, 1, 2, 3, -1, 2, 1] * 4)
    x, bits, domains = inputs.x, inputs.draws, inputs.domains

    def learnt(which: list[list[int]]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        module.zero_grad()
        said = []
        for indices in which:
            mixture = module(ExpertInputs(x[indices], bits[indices], domain_id=domains[indices]))
            total(mixture).backward()
            said.append(mixture.values.detach())
        return torch.cat(said), [parameter.grad for parameter in module.parameters()]

    order = torch.randperm(28).tolist()
    whole, gradients = learnt([order])
    values, summed = learnt([order[:1], order[1:20], order[20:]])
    torch.testing.assert_close(values, whole)
    torch.testing.assert_close(summed, gradients, rtol=1e-4, atol=1e-4)


@KINDS
def test_everything_learns_and_gradients_exist_whatever_the_rows(kind: str) -> None:
    """A rank may have no row of any known domain; every rank must have a gradient of every parameter."""
    config = changed(kind, adversarial_loss=1.0, unknown_share=0.3)
    module = DOMAIN_EXPERTS[type(config)](config, SIZES)

    def gradients(inputs: ExpertInputs) -> dict[str, torch.Tensor | None]:
        module.zero_grad()
        total(module(inputs)).backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}

    assert not [name for name, g in gradients(rows(list(range(DOMAINS)) * 16)).items() if g is None or not g.any()]
    assert not [name for name, g in gradients(rows([-1, -1])).items() if g is None or not g.isfinite().all()]


@pytest.mark.parametrize("kept", [[1], [0, 2], [2, 1], [0, 1, 2]], ids=str)
@KINDS
def test_pruning_changes_no_bit_of_what_stays(kind: str, kept: list[int]) -> None:
    for sizes in (SIZES, dataclasses.replace(SIZES, gate_features=2)):
        whole = make(dataclasses.replace(changed(kind, adversarial_loss=1.0), layer_sizes=[33, 17]), sizes)
        pruned = copy.deepcopy(whole)
        pruned.prune(kept)
        assert not [name for name in pruned.state_dict() if "discriminator" in name]
        for num_rows in (1, 7, 50, 256):
            inputs = rows([d % (DOMAINS + 1) - 1 for d in range(num_rows)], gate_width=sizes.gate_features)
            expected, got = whole(inputs), pruned(inputs)
            assert expected.values.abs().max() > 0
            assert torch.equal(got.values, expected.values[:, kept]), num_rows
            if got.gate_weights is not None and expected.gate_weights is not None:
                others = expected.gate_weights.shape[-1] - 3 * TASKS
                experts = [*range(others), *(others + 3 * t + i for t in kept for i in range(3))]
                assert torch.equal(got.gate_weights, expected.gate_weights[:, kept][..., experts])
                assert torch.equal(got.expert_outputs, expected.expert_outputs[:, experts])


@KINDS
def test_pruned_to_one_task_of_many(kind: str) -> None:
    """Nothing of the others is left; and a sum over experts is long enough to be split over lanes of a register."""
    many = dataclasses.replace(changed(kind, num_shared_experts=9), layer_sizes=[33, 17])
    whole, one = (make(many, dataclasses.replace(SIZES, num_tasks=num)) for num in (9, 1))
    pruned, inputs = copy.deepcopy(whole), rows([0, 1, 2, 3, -1] * 10)
    pruned.prune([4])
    assert torch.equal(pruned(inputs).values, whole(inputs).values[:, [4]])
    shapes = [{name: tensor.shape for name, tensor in module.state_dict().items()} for module in (pruned, one)]
    assert shapes[0] == shapes[1]


@KINDS
def test_a_new_domain_comes_last(kind: str) -> None:
    """Filled with what fewer domains had learnt, their rows read the same."""
    config = changed(kind, adaptation=Adaptation.none)
    old, new = make(config), make(config, dataclasses.replace(SIZES, num_domains=DOMAINS + 1), seed=5)
    for parameter, learnt in zip(new.parameters(), old.parameters(), strict=True):
        parameter.data[: len(learnt)] = learnt.data
    inputs = rows([0, 1, 2, 3, -1])
    torch.testing.assert_close(new(inputs).values, old(inputs).values)


@KINDS
def test_exports_for_any_number_of_rows(kind: str) -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = make(CONFIGS[kind], Sizes(in_features=WIDTH, num_tasks=2, num_domains=2))

        def forward(self, x: torch.Tensor, domain_id: torch.Tensor) -> torch.Tensor:
            return self.experts(ExpertInputs(x, domain_id.new_zeros(0, 2), domain_id=domain_id)).values

    plain, batch = Plain().eval().requires_grad_(False), Dim("batch", min=1)
    example = (torch.zeros(3, WIDTH), torch.zeros(3, dtype=torch.int64))
    program = torch.export.export(plain, example, dynamic_shapes=({0: batch}, {0: batch})).module()
    for domains in ([1], [-1, 2], EVERY * 4):
        inputs = rows(domains)
        torch.testing.assert_close(program(inputs.x, inputs.domains), plain(inputs.x, inputs.domains))


@KINDS
def test_runs_in_bfloat16(kind: str) -> None:
    module, inputs = make(changed(kind, adversarial_loss=1.0)), rows(EVERY)
    expected = module(inputs).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = module(inputs).values
        mixture: Mixture = module.train()(inputs)
    assert (values - expected).abs().max() < 0.05 * expected.abs().max()
    mixture.values.float().sum().backward()


# ---- what is each kind's own


def test_gate_units_start_near_one() -> None:
    gate = GateUnit(2, WIDTH, 64, 9)(torch.randn(500, WIDTH))
    assert gate.shape == (2, 500, 9) and gate.mean().item() == pytest.approx(1, abs=0.1) and gate.std().item() < 0.4


def test_pepnet_s_gates_do_not_teach_what_they_read() -> None:
    """The gradient of the input is the one of gates that are constants."""
    module, inputs = make(CONFIGS["pepnet"]), rows([0, 1, 2])
    inputs.x.requires_grad_()
    said: list[torch.Tensor] = []
    for unit in [module.embedding_gate, *module.gates]:
        unit.register_forward_hook(lambda unit, given, output: said.append(output.detach()))
    (got,) = torch.autograd.grad(module(inputs).values.sum(), inputs.x)
    hidden = said[0][0] * inputs.x
    for delta, layer in zip(said[1:], module.layers, strict=True):
        hidden = layer(delta * hidden)
    (expected,) = torch.autograd.grad(hidden.sum(), inputs.x)
    torch.testing.assert_close(got, expected)


class TestAdaptation:
    @pytest.mark.parametrize("adaptation", list(Adaptation))
    def test_rows_of_a_domain_teach_the_experts_of_others_only_where_asked(self, adaptation: Adaptation) -> None:
        module, inputs = mtmd(adaptation=adaptation, unknown_share=0.0).train(), rows([2] * 6)
        module(inputs).values.sum().backward()
        gradient = module.domain_experts.stacks[0].weights[0].grad.unflatten(0, (DOMAINS, -1)).flatten(1).abs().sum(1)
        others = gradient[[0, 1, 3]]
        assert gradient[2] > 0 and (others > 0).all() if adaptation is Adaptation.full else not others.any()
        if adaptation is not Adaptation.none:
            learnt = module.adaptation.grad.abs().sum(dim=1)
            assert learnt[2] > 0 and not learnt[[0, 1, 3]].any()

    def test_none_reads_the_domain_s_own_expert(self) -> None:
        module, inputs = mtmd(adaptation=Adaptation.none), rows(EVERY)
        own = module.domain_experts(inputs.x)
        assert torch.equal(module(inputs).expert_outputs[:, 2 : 2 + 2 * DOMAINS], own)

    def test_starts_mostly_at_its_own(self) -> None:
        module = MTMD(MTMDConfig(layer_sizes=[5]), SIZES)
        start = torch.softmax(module.adaptation, dim=1)
        expected = np.exp(3) / (np.exp(3) + DOMAINS - 1)
        torch.testing.assert_close(start.diagonal(), torch.full((DOMAINS,), expected, dtype=torch.float32))


class TestUnknownShare:
    def test_hides_the_domain_of_a_share_of_training_rows(self) -> None:
        module, inputs = mtmd(unknown_share=0.3), rows([1] * 3000)
        known, unknown = module(inputs).gate_weights, module(rows([-1] * 3000)).gate_weights
        assert known[..., 4:6].all() and not unknown[..., 2:10].any()  # of the domains' experts
        got = module.train()(inputs).gate_weights
        hidden = uniform(inputs.draws[:, 0], salt=-1000) < 0.3
        torch.testing.assert_close(got, torch.where(hidden[:, None, None], unknown, known))
        assert hidden.float().mean().item() == pytest.approx(0.3, abs=0.03)

    def test_is_what_trains_the_fallback_gates(self) -> None:
        inputs = rows([0, 1, 2, 3] * 16)
        for share in (0.0, 0.3):
            module = mtmd(unknown_share=share).train()
            module(inputs).values.sum().backward()
            assert all(p.grad.any().item() == (share > 0) for p in module.fallback_gates.parameters())


class TestAdversary:
    def penalised(self) -> tuple[MTMD, ExpertInputs, torch.Tensor]:
        module, inputs = mtmd(adversarial_loss=2.0, unknown_share=0.0).train(), rows([0, 3, -1, 1, 2, 9])
        return module, inputs, module(inputs).row_penalty

    def test_is_the_cross_entropy_of_known_rows(self) -> None:
        module, inputs, penalty = self.penalised()
        expected = []
        for x, d in zip(inputs.x.numpy(), inputs.domains.tolist(), strict=True):
            mean = np.mean([mlp(x, module.shared_experts.stacks[0], i) for i in range(2)], axis=0)
            chances = softmax(array(module.discriminator.weight) @ mean + array(module.discriminator.bias))
            expected.append(-2 * np.log(chances[d]) if 0 <= d < DOMAINS else 0.0)
        np.testing.assert_allclose(array(penalty), expected, rtol=1e-4, atol=1e-6)

    def test_the_discriminator_learns_to_guess_and_the_shared_experts_to_hide(self) -> None:
        """A small step of each against its gradient."""
        module, inputs, penalty = self.penalised()
        penalty.sum().backward()
        changes = {}
        for name in ("discriminator", "shared_experts"):
            moved = copy.deepcopy(module)
            for key, parameter in getattr(moved, name).named_parameters():
                parameter.data -= 1e-4 * getattr(module, name).get_parameter(key).grad
            changes[name] = (moved(inputs).row_penalty.sum() - penalty.sum()).item()
        assert changes["discriminator"] < 0 < changes["shared_experts"]
        taught = {name.split(".")[0] for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
        assert taught == {"discriminator", "shared_experts"}

    def test_is_there_only_in_training_and_only_where_asked(self) -> None:
        module, inputs, _ = self.penalised()
        assert module.eval()(inputs).row_penalty is None
        assert mtmd().train()(inputs).row_penalty is None and mtmd().discriminator is None


@pytest.mark.parametrize(
    ("config", "field", "value", "low"),
    [
        *((PEPNetConfig, field, 0, 1) for field in ("gate_size", "domain_dim")),
        *((MTMDConfig, field, 0, 1) for field in ("num_shared_experts", "num_domain_experts", "num_task_experts")),
        *((MTMDConfig, field, -0.5, 0) for field in ("adversarial_loss", "unknown_share")),
        (MTMDConfig, "unknown_share", 1.0, 0),
        (MTMDConfig, "temperature", 0.0, 0.001),
    ],
)
def test_bad_settings_are_refused(config: type[ExpertsConfig], field: str, value: float, low: float) -> None:
    with pytest.raises(ConfigError, match=f"{field} is {value}, expected a value from {low} to"):
        config(**{field: value})
