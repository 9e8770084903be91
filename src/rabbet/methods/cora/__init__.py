"""CoRa: adapters with ranks found by gradient (arXiv 2408.00923)."""
