"""$summary

$source
"""

# Definitions


# The method


# Variants
