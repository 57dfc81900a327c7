"""What is needed of a model: its parts, and whether they are what it computes."""
