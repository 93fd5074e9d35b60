"""The outer loop: a run from its configuration to a deployable optimizer."""
