"""Measuring medseg: how fast beside other pipelines, and how accurate one bundle is beside another."""
