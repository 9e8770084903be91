"""The kinds of layer whose weights can be compressed."""
