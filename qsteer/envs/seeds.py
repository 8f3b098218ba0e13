"""Episodes that are never mixed up: first seeds for what is reported, tuned on, and selected by."""

EVALUATION_SEED = 10_000
"""First seed of the episodes that are reported."""

TUNING_SEED = 20_000
"""First seed of the episodes on which strengths are chosen. Never report what was tuned on."""

VALIDATION_SEED = 30_000
"""First seed of the episodes that choose the best critic of an online run, and that its curves show."""
