"""Decoders and networks larger than memory: one block at a time.

A transformer is a stack of equal blocks. What comes before the first and behind the last is small
but for the table of words, so a method that holds one block, its layers' problems and the hidden
states between blocks can compress a network that memory has no room for.
"""
