"""What the families need to know of other people's modules."""
