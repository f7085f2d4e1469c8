"""TorchServe from the outside: building the model's folder, starting and stopping the server. Never imports ts."""
