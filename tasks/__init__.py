"""kronfluence tasks: one for each trust measurement, and `BackwardTask` for the repair gradient."""

from tasks.backward_task import BackwardTask
from tasks.bias_task import BiasTask
from tasks.ethics_task import EthicsTask
from tasks.truth_task import TruthTask

TRUST_TASKS = {task.name: task for task in (BiasTask, EthicsTask, TruthTask)}

__all__ = ["TRUST_TASKS", "BackwardTask", "BiasTask", "EthicsTask", "TruthTask"]
