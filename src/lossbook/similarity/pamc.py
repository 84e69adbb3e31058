"""Efficient block contrastive learning via parameter-free meta-node approximation

Gayan K. Kulatilleke, Marius Portmann, Shekhar S. Chandra, arXiv 2022, arXiv:2209.14067. Chapter:
chapters/similarity/pamc.ipynb; lab: labs/similarity/pamc.ipynb; tests: tests/similarity/test_pamc.py.
"""

# Definitions


# The method


# Variants
