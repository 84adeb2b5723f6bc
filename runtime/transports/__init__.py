"""How encoded KV gets from one node's memory to another's."""
