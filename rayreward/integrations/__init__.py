"""Ways in from other frameworks, one module for each."""
