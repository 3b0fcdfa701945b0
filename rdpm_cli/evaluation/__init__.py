"""Scores of images: extractors and their features, metrics as functions of arrays, references, records of results."""
