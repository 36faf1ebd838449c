"""The task behind the repair gradient: its "measurement" is the training loss of the chosen subset."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from tasks.base import InfluenceTask
from utils.batching import Batch
from utils.performance_functions.losses import sequence_nll


class BackwardTask(InfluenceTask):
    """Measures the mean token loss of each dialogue."""

    name = "backward"

    def compute_measurement(self, batch: Batch, model: PreTrainedModel) -> torch.Tensor:
        """Lbar(z) = mean of the token cross-entropies over the labels, summed over the batch."""
        return sequence_nll(model, batch).mean.sum()
