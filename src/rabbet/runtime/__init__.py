"""Exported files at work: as networks, and timed."""
