"""Before the blocks: which patches make which visual word."""
