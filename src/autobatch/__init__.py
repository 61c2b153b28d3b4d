"""Memory-aware batch sizes: what fits, how to reach the effective batch, and what it costs."""
