"""The bias task."""

from tasks.backward_task import TrustTask
from utils.performance_functions.bias import BIAS


class BiasTask(TrustTask):
    """Traces what moves the bias log-odds loss."""

    measurement = BIAS
