"""Evaluate: accuracy, agreement with the teacher, size and speed of every model in the chain."""
