"""Policies that other programs trained, read from and written back to their own formats."""
