"""Codes -> codes of new images: the transformer, the families behind one contract, guidance, the sampler."""
