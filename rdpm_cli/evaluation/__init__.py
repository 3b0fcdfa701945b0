"""Scores: features, pure metrics, references, results that say what they were computed with."""
