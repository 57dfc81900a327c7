"""Figures of words, stages, profiles and fronts."""
