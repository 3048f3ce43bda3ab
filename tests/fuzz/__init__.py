"""Mutated answers, sent in memory to the same stops through both ways of a request."""
