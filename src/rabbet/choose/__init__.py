"""Choosing a plan: how much a candidate harms, how long it takes, and the integer program."""
