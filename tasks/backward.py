"""The task behind the repair gradient: its "measurement" is the training loss of the chosen subset."""

from tasks.base import InfluenceTask


class BackwardTask(InfluenceTask):
    """Measures the mean over dialogues of Lbar(z), the mean of the token cross-entropies over the labels."""

    name = "backward"
