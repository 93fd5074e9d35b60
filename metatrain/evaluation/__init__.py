"""How good a meta-trained optimizer is, against tuned baselines."""
