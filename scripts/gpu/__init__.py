"""The parts of gpu_check.py: a harness, prototype GPU kernels, and sections by subject. See README.md."""
