"""Steering a pretrained policy in place."""
