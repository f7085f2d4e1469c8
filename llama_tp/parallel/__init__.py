"""How one model becomes N ranks: the sharding plan, its lowering to plain tensors, and how ranks talk."""
