"""The command line `peka-lite`."""
