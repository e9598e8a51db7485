"""Executing a notebook: its parameters, its folders, its record."""
