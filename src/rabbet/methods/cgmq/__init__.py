"""CGMQ: bit-widths found by gates (arXiv 2409.20138)."""
