"""Fused kernels in Triton, one file each: the kernel, its autograd function, and the plain torch under it."""
