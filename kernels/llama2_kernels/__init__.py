"""Kernels for the Llama 2 architecture, each beside the plain PyTorch function that specifies it."""
