"""What is said over HTTP: the bodies that frameworks send and the replies that they expect.

A module for each family of dialects. Does not know HTTP, or pools.
"""
