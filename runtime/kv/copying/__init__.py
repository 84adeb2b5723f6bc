"""Hot copies: KV of running answers, kept up to date on another node, and what a takeover does with it."""
