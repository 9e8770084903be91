"""Numbers on few bits: grids, and how their codes are packed."""
