"""Recorded performance on purpose: a designed grid of contexts, run with every strategy on real local clusters."""
