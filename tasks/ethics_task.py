"""The ethics task."""

from tasks.backward_task import TrustTask
from utils.performance_functions.ethics import ETHICS


class EthicsTask(TrustTask):
    """Traces what moves the ethics log-odds loss."""

    measurement = ETHICS
