"""One Llama on one device, in plain PyTorch. Knows nothing of ranks, requests or text."""
