"""What decisions learn from."""
