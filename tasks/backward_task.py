"""The base of all tasks (training loss, sampled labels of the Fisher, mask), and the task of the repair gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from kronfluence.task import Task

from utils.performance_functions.losses import sampled_label_loss, sequence_nll

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from utils.batching import Batch
    from utils.performance_functions.pairs import Measurement


class BackwardTask(Task):
    """A kronfluence task whose training examples are dialogues.

    The steps call its two losses alone; the list of modules and the mask are for kronfluence's own Analyzer, against
    which the tests compare, and for whoever uses one.

    Its own measurement is the mean loss of chosen dialogues, whose gradient is the repair gradient; the trust tasks
    measure answer pairs. The formula is the same, and the weights in the batch differ.

    Args:
        tracked_modules: dotted names of the Linears that are traced.
        seed: of the labels sampled for the Fisher.
        fisher_positions: "completion" samples labels where the training loss has them, "all" everywhere.
    """

    def __init__(self, tracked_modules: list[str], seed: int = 42, fisher_positions: str = "completion") -> None:
        self.tracked_modules = tracked_modules
        self.seed = seed
        self.all_positions = fisher_positions == "all"

    def compute_train_loss(self, batch: Batch, model: PreTrainedModel, sample: bool = False) -> torch.Tensor:
        """L(z) = sum of the token cross-entropies over the labels, summed over the batch.

        With `sample`, the labels are drawn from the model, for the true Fisher.
        """
        if sample:
            return sampled_label_loss(model, batch, self.seed, self.all_positions)
        return sequence_nll(model, batch).total.sum()

    def compute_measurement(self, batch: Batch, model: PreTrainedModel) -> torch.Tensor:
        """sum_u weight_u NLL_u, with NLL_u the mean over the label tokens of sequence u.

        With the weights of answer pairs this is f_task; with 1 / K it is the mean Lbar of K dialogues.
        """
        return (batch["weight"] * sequence_nll(model, batch).mean).sum()

    def get_influence_tracked_modules(self) -> list[str]:
        """Every Linear of the last blocks."""
        return self.tracked_modules

    def get_attention_mask(self, batch: Batch) -> torch.Tensor:
        """(B, T): padding does not enter the activation covariance."""
        return batch["attention_mask"]


class TrustTask(BackwardTask):
    """A task whose measurement is the log-odds loss over answer pairs."""

    measurement: ClassVar[Measurement]
    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.name = cls.measurement.name
