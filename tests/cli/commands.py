"""Settings that the tests of the command line share."""

# A small menu for the demo network: most of these tests need a choice, not a good one.
QUICK = ("--method", "joint grids=('2hc','4c','8c') forms=() adapters=() tuning.steps=0")
