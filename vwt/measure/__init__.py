"""Timing, and the machine it is done on."""
