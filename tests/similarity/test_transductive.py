"""Tests of ``lossbook.similarity.transductive``."""

# The theorems as properties


# Closed forms


# Limits


# Bad input
