"""Tests of ``lossbook.similarity.pamc``."""

# The theorems as properties


# Closed forms


# Limits


# Bad input
