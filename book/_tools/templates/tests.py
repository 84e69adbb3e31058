"""Tests of ``$module_name``."""

# The theorems as properties


# Closed forms


# Limits


# Bad input
