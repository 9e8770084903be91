"""What the user brings besides the network: batches, and how a network is run and judged on them."""
