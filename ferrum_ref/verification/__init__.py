"""A checkpoint on this machine, run here and by transformers: layer by layer, down to the first that differs."""
