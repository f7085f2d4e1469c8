"""What a model needs on a device, before there is a checkpoint or a device: arithmetic only."""
