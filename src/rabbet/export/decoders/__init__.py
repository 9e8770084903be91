"""Files of causal language models of transformers, for the programs that run these."""
