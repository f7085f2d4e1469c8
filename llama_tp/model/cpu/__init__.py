"""The decode step as C++ kernels for CPUs, compiled on this machine."""
