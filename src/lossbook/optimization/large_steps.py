"""From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes

Alexander Tyurin, AAAI 2025, arXiv:2412.08424. Chapter: chapters/optimization/large_steps.ipynb; lab:
labs/optimization/large_steps.ipynb; tests: tests/optimization/test_large_steps.py.
"""

# Definitions


# The method


# Variants
