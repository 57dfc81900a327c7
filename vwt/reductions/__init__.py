"""Inside the blocks: fewer tokens between attention and MLP."""
