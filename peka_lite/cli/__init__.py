"""Provide the command line `peka-lite`."""
