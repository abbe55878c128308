"""Sharing between tasks that knows which domain a row is of: an ad placement, a tab, a surface.

STAR (Sheng et al., CIKM 2021), PEPNet (Chang et al., KDD 2023) and MTMD (arXiv 2510.09857), behind `ExpertInputs -> Mixture`.
D domains are known to training. Every other number of a domain, -1 or D and above, is an unknown one, and each kind says what
its rows read. Parameters of domains have the domain as their first dimension, so that those of a new one come last.
"""

from dataclasses import dataclass
from enum import Enum
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rec.hashing import uniform
from rec.mixtures import (
    ExpertConfig,
    ExpertInputs,
    Experts,
    ExpertsConfig,
    ExpertStack,
    GatedConfig,
    Gates,
    Mixture,
    Sizes,
    mix_experts,
)
from rec.schema import check_range
from rec.stacked import StackedMLP, prune_stack

_UNKNOWN_SALT = -1000  # apart from those of expert dropout, from 0 up, and of sampled negatives, from -1 down


@dataclass
class StarConfig(ExpertsConfig):
    """One network for all tasks whose weights are a shared part times one of the domain."""

    kind: str = "star"


@dataclass
class PEPNetConfig(ExpertsConfig):
    """A network a task; gates that know the domain scale its input and its hidden units, by 0 to 2."""

    kind: str = "pepnet"
    gate_size: int = 64  # width of the gates' hidden layer, at least 1
    domain_dim: int = 16  # width of a domain's embedding, at least 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("model.experts.gate_size", self.gate_size, 1, 100_000)
        check_range("model.experts.domain_dim", self.domain_dim, 1, 100_000)


class Adaptation(Enum):
    """What a domain takes from the experts of the others."""

    none = "none"  # nothing
    stop_gradient = "stop_gradient"  # their outputs, without teaching them
    full = "full"  # their outputs, teaching them as well


@dataclass
class MTMDConfig(GatedConfig):
    """Experts of all, of each domain and of each task, and a gate for every pair of domain and task."""

    kind: str = "mtmd"
    num_shared_experts: int = 2  # at least 1; all experts are MLPs of layer_sizes
    num_domain_experts: int = 1  # at least 1 for each domain
    num_task_experts: int = 1  # at least 1 for each task
    adaptation: Adaptation = Adaptation.stop_gradient
    adversarial_loss: float = 0.0  # >= 0; weight of the loss that hides the domain from the shared experts
    unknown_share: float = 0.05  # 0 to 0.99; share of training rows that read as if of an unknown domain

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("model.experts.num_shared_experts", self.num_shared_experts, 1, 10_000)
        check_range("model.experts.num_domain_experts", self.num_domain_experts, 1, 10_000)
        check_range("model.experts.num_task_experts", self.num_task_experts, 1, 10_000)
        check_range("model.experts.adversarial_loss", self.adversarial_loss, 0, 1e6)
        check_range("model.experts.unknown_share", self.unknown_share, 0, 0.99)


def _places(domains: Tensor, num_domains: int) -> Tensor:
    """[B] int64, the domain of each row, and D, the place behind the last, for an unknown one."""
    return torch.where((domains >= 0) & (domains < num_domains), domains, num_domains)


def _at(places: Tensor, values: Tensor) -> Tensor:
    """[B] and [B, P, ...] -> [B, ...], what each row has at its place."""
    index = places.view(-1, *[1] * (values.dim() - 1)).expand(-1, 1, *values.shape[2:])
    return values.gather(1, index).squeeze(1)


class StarLayer(nn.Module):
    """relu(x (W_p * W) + b_p + b), elementwise products of weights (Sheng et al. 2021); of an unknown domain W and b.

    A batch mixes domains, so every domain's product is taken of all rows and each row keeps one: D + 1 times the work of one
    network, in one batched product of fixed shape.
    """

    def __init__(self, num_domains: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.domain_weights = nn.Parameter(torch.ones(num_domains, in_features, out_features))
        self.domain_biases = nn.Parameter(torch.zeros(num_domains, out_features))
        nn.init.kaiming_uniform_(self.weight, mode="fan_out", nonlinearity="relu")  # [in, out]: fan_out is the input

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """[B, in] and places [B], 0 to D -> [B, out]."""
        weights = torch.cat([self.domain_weights * self.weight, self.weight.unsqueeze(0)])
        biases = torch.cat([self.domain_biases + self.bias, self.bias.unsqueeze(0)])
        of_all = torch.baddbmm(biases.unsqueeze(1), x.expand(len(weights), -1, -1), weights)  # [D + 1, B, out]
        return torch.relu(_at(places, of_all.transpose(0, 1)))


class Star(Experts):
    """Star topology adaptive recommender (Sheng et al., CIKM 2021): every tower reads one network of the row's domain.

    The input is normalised with a scale and an offset of the domain, (gamma_p * gamma) n(z) + beta_p + beta. The paper's n
    standardises a unit over the rows of the domain in the batch. What a rank computes would then depend on which other rows it
    holds, and one rank would not train what several do; so n is a layer norm, over the units of the row.

    The paper's auxiliary network adds a logit of the domain. There are no logits here, so it is left out; linear features can
    add one. A row of an unknown domain reads the shared W, b, gamma and beta alone.
    """

    def __init__(self, config: StarConfig, sizes: Sizes) -> None:
        super().__init__()
        self.num_domains, self.num_tasks = sizes.num_domains, sizes.num_tasks
        widths = [sizes.in_features, *config.layer_sizes]
        self.norm = nn.LayerNorm(sizes.in_features)
        self.domain_scales = nn.Parameter(torch.ones(sizes.num_domains, sizes.in_features))
        self.domain_offsets = nn.Parameter(torch.zeros(sizes.num_domains, sizes.in_features))
        self.layers = nn.ModuleList(StarLayer(sizes.num_domains, i, o) for i, o in pairwise(widths))

    def forward(self, inputs: ExpertInputs) -> Mixture:
        """Values [B, T, H], the same for every task."""
        places = _places(inputs.domains, self.num_domains)
        x = self._normalised(inputs.x, places)
        for layer in self.layers:
            x = layer(x, places)
        return Mixture(x.unsqueeze(1).expand(-1, self.num_tasks, -1))

    def prune(self, tasks: list[int]) -> None:
        """Every tower reads the one network."""
        self.num_tasks = len(tasks)

    def _normalised(self, x: Tensor, places: Tensor) -> Tensor:
        scales = torch.cat([self.domain_scales * self.norm.weight, self.norm.weight.unsqueeze(0)])
        offsets = torch.cat([self.domain_offsets + self.norm.bias, self.norm.bias.unsqueeze(0)])
        whole = F.layer_norm(x, self.norm.normalized_shape, eps=self.norm.eps)
        return whole * scales[places] + offsets[places]


class GateUnit(nn.Module):
    """Gate NU: 2 sigmoid(relu(x W1 + b1) W2 + b2), 0 to 2 and near 1 at the start (Chang et al., KDD 2023).

    Args:
        num: N, gates that share the hidden layer and have a W2 and b2 each.
        in_features: width of the input.
        hidden: width of the hidden layer.
        out_features: width of a gate's output.
    """

    def __init__(self, num: int, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.hidden = StackedMLP(1, in_features, [hidden])
        self.out = StackedMLP(num, hidden, [out_features], activate_last=False)
        nn.init.uniform_(self.out.weights[0], -(hidden**-0.5), hidden**-0.5)  # as nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """[B, in] -> [N, B, out]."""
        logits = self.out(self.hidden(x)[0])
        if self.training:
            return 2 * torch.sigmoid(logits)
        # The last few elements of a tensor take another code path with another rounding: each gate gets a tensor of its own,
        # so that pruning others changes no bit of it.
        return 2 * torch.stack([torch.sigmoid(one) for one in logits.unbind()])


class PEPNet(Experts):
    """Parameter and embedding personalised network (Chang et al., KDD 2023).

    EPNet scales what comes in, O = U(e_d, sg(z)) * z, with an embedding e_d of the domain and U a Gate NU; sg stops the
    gradient. PPNet is a network a task, H_0 = O, H_{l+1} = relu((U_l(prior, sg(O)) * H_l) W_l + b_l); the gates U_l of a layer
    share their hidden layer over tasks. The paper's prior is embeddings of user, item and author. Here it is e_d, since z holds
    the others already, and the gates' own inputs where there are such.

    A row of an unknown domain has zeros for e_d, around which the embeddings start.
    """

    def __init__(self, config: PEPNetConfig, sizes: Sizes) -> None:
        super().__init__()
        self.num_domains = sizes.num_domains
        self.own_prior = sizes.gate_features is not None
        width, dim = sizes.in_features, config.domain_dim
        self.domain_embeddings = nn.Parameter(torch.randn(sizes.num_domains, dim) * dim**-0.5)  # of length near 1
        self.embedding_gate = GateUnit(1, dim + width, config.gate_size, width)
        prior = dim + (sizes.gate_features or 0)
        widths = [width, *config.layer_sizes]
        self.gates = nn.ModuleList(
            GateUnit(sizes.num_tasks, prior + width, config.gate_size, size) for size in widths[:-1]
        )
        self.layers = nn.ModuleList(StackedMLP(sizes.num_tasks, i, [o]) for i, o in pairwise(widths))

    def forward(self, inputs: ExpertInputs) -> Mixture:
        """Values [B, T, H]."""
        embeddings = F.pad(self.domain_embeddings, (0, 0, 0, 1))  # zeros for an unknown domain
        domain = embeddings[_places(inputs.domains, self.num_domains)]
        x = self.embedding_gate(torch.cat([domain, inputs.x.detach()], dim=1))[0] * inputs.x  # [B, d]
        prior = torch.cat([domain, inputs.gates], dim=1) if self.own_prior else domain
        gate_x = torch.cat([prior, x.detach()], dim=1)
        for gate, layer in zip(self.gates, self.layers, strict=True):
            x = layer(gate(gate_x) * x)  # [T, B, width]
        return Mixture(x.transpose(0, 1))

    def prune(self, tasks: list[int]) -> None:
        """Leave only the networks of `tasks` and the gates' outputs for them."""
        for gate in self.gates:
            assert isinstance(gate, GateUnit)
            prune_stack(gate.out, tasks)
        prune_stack(self.layers, tasks)


class MTMD(Experts):
    """Multi-task multi-domain network, after arXiv 2510.09857, which describes the parts and gives no equations.

    Experts are numbered S_1.. (all tasks, all domains), D_1.. (domain by domain), T_1.. (task by task). With A = softmax of the
    rows of a D x D matrix that starts at three times the identity, domain d reads

        Dhat_d = A_dd D_d(z) + sum over j != d of A_dj sg(D_j(z))

    where sg stops the gradient, so that rows of one domain do not change the experts of another (as HMoE: Li et al., CIKM 2020);
    `Adaptation.full` leaves sg out, `Adaptation.none` reads D_d(z). Task t in domain d reads g_dt [S_1.., Dhat_d, T_t], with a
    softmax gate g_dt of the pair. Expert dropout knows an expert by its place in this list: all D_d are one, all T_t are one.

    An unknown domain has a gate a task over shared and task experts. These fallback gates train on `unknown_share` of the
    rows, drawn by row and step and thus the same on any number of ranks.

    With `adversarial_loss` a linear discriminator guesses the domain from the mean of the shared experts, behind a reversal of
    the gradient (Ganin et al., JMLR 2016): it learns to guess, they learn to hide.
    """

    def __init__(self, config: MTMDConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.num_domains, self.num_tasks = sizes.num_domains, sizes.num_tasks
        self.shared_experts = self._stack(config.num_shared_experts, sizes, repeat=1)
        self.domain_experts = self._stack(config.num_domain_experts, sizes, repeat=sizes.num_domains)
        self.task_experts = self._stack(config.num_task_experts, sizes, repeat=sizes.num_tasks)
        if config.adaptation is not Adaptation.none:
            self.adaptation = nn.Parameter(3 * torch.eye(sizes.num_domains))
        self.nums = [config.num_shared_experts, config.num_domain_experts, config.num_task_experts]
        allowed = torch.ones(sizes.num_domains * sizes.num_tasks, sum(self.nums), dtype=torch.bool)
        self.gates = Gates(config, sizes.gates, allowed=allowed)  # domain by domain
        without_domain = torch.ones(sizes.num_tasks, sum(self.nums), dtype=torch.bool)
        without_domain[:, self.nums[0] : -self.nums[2]] = False
        self.fallback_gates = Gates(config, sizes.gates, allowed=without_domain)
        width = config.layer_sizes[-1]
        self.discriminator = nn.Linear(width, sizes.num_domains) if config.adversarial_loss else None

    def forward(self, inputs: ExpertInputs) -> Mixture:
        """Values [B, T, H]; gate_weights [B, T, N] and expert_outputs [B, N, H] with Dhat_1.. in the domains' places.

        In training with `adversarial_loss` also row_penalty [B], the weighed cross-entropy, 0 in rows of an unknown domain.
        """
        places = self._places(inputs)
        gates = self._gates_of_rows(inputs, places)
        shared, of_tasks = self.shared_experts(inputs.x), self.task_experts(inputs.x)
        of_domains = self._adapted(self.domain_experts(inputs.x))
        # Where the domain is unknown any will do: its gate gives a domain's experts 0.
        own = _at(places.clamp(max=self.num_domains - 1), of_domains)  # [B, n, H]
        reach = gates.split([sum(self.nums[:2]), self.nums[2]], dim=-1)
        values = mix_experts(reach[0], torch.cat([shared, own], dim=1), apart=not self.training)
        values = values + self._of_task(reach[1], of_tasks)
        outputs = torch.cat([shared, of_domains.flatten(1, 2), of_tasks], dim=1)
        return Mixture(values, self._spread(gates, places), outputs, self._penalty_of_rows(shared, places))

    def prune(self, tasks: list[int]) -> None:
        """Leave only the gates and experts of `tasks`, and what all tasks read."""
        self.gates.prune([d * self.num_tasks + t for d in range(self.num_domains) for t in tasks])
        self.fallback_gates.prune(tasks)
        self.task_experts.prune(tasks)
        self.num_tasks = len(tasks)
        self.discriminator = None

    def _stack(self, num: int, sizes: Sizes, *, repeat: int) -> ExpertStack:
        return ExpertStack([ExpertConfig(num=num)], sizes.in_features, self.config.layer_sizes, repeat=repeat)

    def _places(self, inputs: ExpertInputs) -> Tensor:
        places = _places(inputs.domains, self.num_domains)
        if not self.training or not self.config.unknown_share:
            return places
        hidden = uniform(inputs.draws[:, 0], salt=_UNKNOWN_SALT) < self.config.unknown_share
        return places.masked_fill(hidden, self.num_domains)

    def _gates_of_rows(self, inputs: ExpertInputs, places: Tensor) -> Tensor:
        """[B, T, shared + a domain's + a task's], of the row's domain."""
        known = self.gates(inputs.gates, inputs.draws).unflatten(1, (self.num_domains, self.num_tasks))
        fallback = self.fallback_gates(inputs.gates, inputs.draws).unsqueeze(1)
        return _at(places, torch.cat([known, fallback], dim=1))

    def _adapted(self, outputs: Tensor) -> Tensor:
        """D_1.. [B, D * n, H] -> Dhat_1.. [B, D, n, H]."""
        outputs = outputs.unflatten(1, (self.num_domains, -1))
        if self.config.adaptation is Adaptation.none:
            return outputs
        mixing = torch.softmax(self.adaptation, dim=1).to(outputs.dtype)
        own = mixing.diagonal()
        others = outputs.detach() if self.config.adaptation is Adaptation.stop_gradient else outputs
        return own[:, None, None] * outputs + torch.einsum("ij,bjnh->binh", mixing - torch.diag(own), others)

    def _of_task(self, gates: Tensor, outputs: Tensor) -> Tensor:
        """[B, T, m] and [B, T * m, H] -> [B, T, H]; term by term, so that pruning other tasks changes no bit."""
        gates, outputs = gates.to(outputs.dtype), outputs.unflatten(1, (self.num_tasks, -1))
        terms = [gates[..., [i]] * outputs[:, :, i] for i in range(self.nums[2])]
        return sum(terms[1:], terms[0])

    def _spread(self, gates: Tensor, places: Tensor) -> Tensor:
        """The gates' weights [B, T, N] over all experts, 0 where the row's domain or the task reads none."""
        shared, of_domain, of_task = gates.split(self.nums, dim=-1)
        here = places.unsqueeze(1) == torch.arange(self.num_domains, device=places.device)  # [B, D]
        own = torch.eye(self.num_tasks, device=gates.device)
        of_domains = here[:, None, :, None] * of_domain.unsqueeze(2)  # [B, T, D, n]
        of_tasks = own[:, :, None] * of_task.unsqueeze(2)  # [B, T, T, m]
        return torch.cat([shared, of_domains.flatten(2), of_tasks.flatten(2)], dim=-1)

    def _penalty_of_rows(self, shared: Tensor, places: Tensor) -> Tensor | None:
        if self.discriminator is None or not self.training:
            return None
        mean = shared.mean(dim=1)
        reversed_ = 2 * mean.detach() - mean  # the same number, of the opposite gradient
        loss = F.cross_entropy(
            self.discriminator(reversed_).float(), places, reduction="none", ignore_index=self.num_domains
        )
        return self.config.adversarial_loss * loss


DOMAIN_KINDS: dict[str, type[ExpertsConfig]] = {
    "star": StarConfig,
    "pepnet": PEPNetConfig,
    "mtmd": MTMDConfig,
}
DOMAIN_EXPERTS: dict[type[ExpertsConfig], type[Experts]] = {
    StarConfig: Star,
    PEPNetConfig: PEPNet,
    MTMDConfig: MTMD,
}
