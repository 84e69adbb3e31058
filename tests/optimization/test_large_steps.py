"""Tests of ``lossbook.optimization.large_steps``."""

# The theorems as properties


# Closed forms


# Limits


# Bad input
