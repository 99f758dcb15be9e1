"""Ways to bring tasks to clients and replies back."""
