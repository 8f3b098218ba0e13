"""Latency: what an action costs, counted, measured, and compared with what the device could do."""
