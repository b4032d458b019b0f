"""Experiments: arms × seeds of ordinary runs from one YAML file, and where they stand."""
