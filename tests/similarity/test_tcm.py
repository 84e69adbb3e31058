"""Tests of ``lossbook.similarity.tcm``."""

# The theorems as properties


# Closed forms


# Limits


# Bad input
