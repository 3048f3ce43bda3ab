"""The limiter: how many attempts are in flight, and how fast they start."""
