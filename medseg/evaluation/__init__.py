"""Metrics and measurements: arrays in, numbers out."""
