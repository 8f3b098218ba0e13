"""Simulated environments: where the data comes from and where steered policies are measured."""
