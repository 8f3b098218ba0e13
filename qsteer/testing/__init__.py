"""Random-weight policies of every supported family, for tests, benchmarks and examples without downloads."""
