"""Latency: what an action costs, counted, measured, and compared with what the device could do.

Depends on everything but the evaluation; nothing but the command line and ``evaluation.compare`` uses it.
"""
