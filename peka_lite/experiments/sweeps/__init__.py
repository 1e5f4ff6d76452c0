"""Parameter sweeps: many runs from one YAML file."""
