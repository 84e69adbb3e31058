"""Similarity: contrast, metric, few shots."""
