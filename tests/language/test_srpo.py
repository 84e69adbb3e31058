"""Tests of ``lossbook.language.srpo``."""

# The theorems as properties


# Closed forms


# Limits


# Bad input
