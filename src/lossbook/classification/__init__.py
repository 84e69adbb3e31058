"""Classification: what a classifier minimizes."""
