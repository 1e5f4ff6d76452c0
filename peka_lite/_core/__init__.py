"""Files, hashes and devices: what every package needs and no user calls."""
