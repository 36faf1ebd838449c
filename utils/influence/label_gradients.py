"""What the output embedding says of each label, kept for further passes over a frozen model.

The loss of a label and its gradient in the last hidden state depend on weights and tokens alone. On a small model with
a large vocabulary most of a pass goes into them; a pass that finds them runs the traced blocks alone.
"""

from __future__ import annotations

import torch

from utils.batching import Batch
from utils.performance_functions.losses import KNOWN_LABELS, KnownLabels

BYTES_ON_CPU = 2 << 30  # beyond it, but for a last batch, they are computed again
BYTES_ON_GPU = 4 << 30


class LabelGradientCache:
    """The losses of labels and their gradients, by batch; for as long as nothing of the model changes."""

    def __init__(self, device: torch.device) -> None:
        self.max_bytes = BYTES_ON_GPU if device.type == "cuda" else BYTES_ON_CPU
        self._known: dict[tuple[int, ...], KnownLabels] = {}  # by width, then positions in the loader's list
        self._is_full = False

    def add_to(self, batch: Batch) -> Batch:
        """The batch with what is known of its labels, which a pass fills in."""
        key = (batch["input_ids"].shape[1], *batch["index"].tolist())
        if key not in self._known:
            if not self._is_full:
                used = sum(tensor.nbytes for labels in self._known.values() for of in labels.values() for tensor in of)
                self._is_full = used >= self.max_bytes
            if self._is_full:
                return batch
            self._known[key] = {}
        return {**batch, KNOWN_LABELS: self._known[key]}
