"""Running exported files: as networks, and timed."""
