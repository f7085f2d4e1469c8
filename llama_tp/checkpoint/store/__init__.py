"""The checkpoint that is served: sharded files, and the manifest that vouches for them."""
