"""Where tasks run: in this process, or in Ray actors on one machine or a cluster.

Both do the same with the same worker and the same schedule; a task's numbers do not depend on which.
"""

from pipeline.executors.base import Executor, ExecutorError
from pipeline.executors.here import SerialExecutor
from pipeline.executors.on_ray import RayExecutor

__all__ = ["Executor", "ExecutorError", "RayExecutor", "SerialExecutor"]
