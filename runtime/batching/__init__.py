"""Which rows run next: pure schedulers, no clock, no I/O."""
