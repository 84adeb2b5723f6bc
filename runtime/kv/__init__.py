"""KV on its way between nodes; `types` is the part that the orchestrator shares."""
