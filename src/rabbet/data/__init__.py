"""The user's data: batches, and how a network is run and judged on them."""
