"""Whole actions made fast: run on buffers of their own, captured as CUDA graphs, or compiled by Inductor."""
