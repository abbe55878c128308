"""A split through the network, measured over all ranks."""

from collections.abc import Callable

import torch
from torch import nn

from rec.data import Reader
from rec.health import ExpertHealth
from rec.metrics import EvalResult, MultitaskMetrics
from rec.predictions import Correction, PredictionWriter, predict


@torch.no_grad()
def evaluate(
    model: nn.Module,
    reader: Reader,
    metrics: MultitaskMetrics,
    *,
    device: torch.device,
    max_steps: int | None = None,
    calibrators: Correction | None = None,
    predictions: PredictionWriter | None = None,
    health: ExpertHealth | None = None,
    before_each: Callable[[], None] | None = None,
) -> EvalResult:
    """Metrics of a split over all ranks, the same on each. Ranks stay in step throughout.

    Args:
        model: the sharded network.
        reader: batches of the split.
        metrics: reset, filled and computed here.
        device: where the model lives.
        max_steps: steps at most; None for the whole split.
        calibrators: applied to the logits; None leaves them as they are.
        predictions: also gets the rows; None keeps none.
        health: reset and filled here, where the network has gates; None where it has none.
        before_each: called for every batch; what it raises on all ranks breaks the evaluation off.
    """
    metrics.reset()
    if health is not None:
        health.reset()
    predicting = predict(model, reader, device=device, max_steps=max_steps, calibrators=calibrators)
    for step, predicted in enumerate(predicting):
        if before_each is not None:
            before_each()
        batch, logits, gates = predicted.batch, predicted.logits, predicted.outputs.gate_weights
        experts = predicted.outputs.expert_outputs
        if health is not None and gates is not None and experts is not None:
            rows_before = step * reader.config.global_batch_size
            health.update(gates, experts, batch.row_id >= 0, rows_before=rows_before)
        metrics.update(logits, batch.labels, batch.weights, batch.domain_id, batch.group_id, batch.truth)
        if predictions is not None:
            predictions.write(batch, logits)
    return metrics.compute()
