"""The served checkpoint: sharded files, and the manifest that verifies them."""
