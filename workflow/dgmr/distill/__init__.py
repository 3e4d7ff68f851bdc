"""Distill: train the pruned student on the teacher's cached outputs, stage after stage."""
