"""Models from the Hugging Face hub: one form of each, complete and verified."""
