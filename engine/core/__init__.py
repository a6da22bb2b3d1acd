"""What an engine decides, on the host and without jax: requests, scheduling, plans of steps."""
