"""One call: its attempts, its retries, and the observers that follow it."""
