"""Optimization: how it is minimized."""
