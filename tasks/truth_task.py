"""The truth task."""

from tasks.backward_task import TrustTask
from utils.performance_functions.truth import TRUTH


class TruthTask(TrustTask):
    """Traces what moves the truth log-odds loss."""

    measurement = TRUTH
