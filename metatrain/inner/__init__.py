"""The inner loop: candidates train a task's network."""
