"""How many attempts may be in flight, and how fast they may start."""
