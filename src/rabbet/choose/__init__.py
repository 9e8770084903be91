"""Choosing a plan: what a candidate harms, how long it takes, and the integer program."""
