"""What everything works on: patches, words, packed sequences, positions, and attention over them."""
