"""Tests of ``lossbook.classification.comp_sum``."""

# The theorems as properties


# Closed forms


# Limits


# Bad input
