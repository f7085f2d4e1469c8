"""Running TorchServe: build the model folder, start and stop the server. Never imports ts."""
