"""Handle files, locks, hashes, progress and devices for all packages; not public."""
