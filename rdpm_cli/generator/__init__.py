"""Codes -> new codes: the transformer, the families behind one contract, guidance, the sampler."""
