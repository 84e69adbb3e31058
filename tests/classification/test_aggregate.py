"""Tests of ``lossbook.classification.aggregate``."""

# The theorems as properties


# Closed forms


# Limits


# Bad input
