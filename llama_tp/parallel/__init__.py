"""How one model runs on N ranks: the sharding plan, its localization to plain tensors, and communication."""
