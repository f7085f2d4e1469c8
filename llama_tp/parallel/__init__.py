"""How one model becomes N ranks: the sharding plan, its localization to plain tensors, and how ranks talk."""
