"""Joules: sensors, and a meter over them."""
