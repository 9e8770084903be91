"""Solving for the numbers of a plan without training: each layer alone, then all in order."""
