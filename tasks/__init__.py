"""Training problems for meta-training and evaluation."""

from tasks.base import Aux, Task, TaskError, TaskSample, sample, uniform_batches
from tasks.registry import TASKS, make_task, prepare_task

__all__ = ["TASKS", "Aux", "Task", "TaskError", "TaskSample", "make_task", "prepare_task", "sample", "uniform_batches"]
