"""kronfluence tasks: one for each trust measurement, and `backward` for the repair gradient."""

from tasks.backward import BackwardTask
from tasks.bias import BiasTask
from tasks.ethics import EthicsTask
from tasks.truth import TruthTask

TRUST_TASKS = {task.name: task for task in (BiasTask, EthicsTask, TruthTask)}

__all__ = ["TRUST_TASKS", "BackwardTask", "BiasTask", "EthicsTask", "TruthTask"]
