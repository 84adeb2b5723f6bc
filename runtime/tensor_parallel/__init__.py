"""One prefill engine over several devices: each rank has a share of the heads and columns of every layer."""
