"""The seam between tokenizer and generator: codes of every quantisation step on disk."""
