"""What gpu_check.py consists of: a harness, prototypes of GPU kernels, and sections by subject. See README.md."""
