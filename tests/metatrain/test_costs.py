"""What a candidate-step of each task costs, from made-up times."""

from __future__ import annotations

import math

import numpy as np

from metatrain.ray.costs import TaskCosts


def test_a_cost_is_in_steps_of_the_task_that_was_measured_first() -> None:
    costs, tasks, steps = TaskCosts(), np.array([0, 1, 2]), np.array([10.0, 10.0, 10.0])
    np.testing.assert_array_equal(costs.cost(tasks, steps), steps)  # nothing is known
    costs.note(tasks[1:2], steps[1:2], np.array([0.1]))
    np.testing.assert_allclose(costs.cost(tasks, steps), steps)
    costs.note(tasks, steps, np.array([2.0, 0.1, math.nan]))
    np.testing.assert_allclose(costs.cost(tasks, steps), [200.0, 10.0, 10.0])


def test_the_least_time_counts() -> None:
    costs, task = TaskCosts(), np.array([0, 0, 0])
    costs.note(task, np.array([10.0, 20.0, 10.0]), np.array([1.0, 1.0, math.nan]))  # .1 and .05 s a step
    costs.note(np.array([1]), np.array([1.0]), np.array([0.5]))
    costs.note(np.array([1]), np.array([1.0]), np.array([9.0]))  # a machine that does other work, too
    np.testing.assert_allclose(costs.cost(np.array([0, 1]), np.ones(2)), [1.0, 10.0])
    costs.note(np.array([0]), np.array([1.0]), np.array([0.025]))  # the unit stays
    np.testing.assert_allclose(costs.cost(np.array([0, 1]), np.ones(2)), [0.5, 10.0])
