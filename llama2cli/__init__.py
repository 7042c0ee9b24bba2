"""The Llama 2 paper (Touvron et al. 2023, arXiv 2307.09288) as a Unix toolkit."""

__version__ = "0.1.0"
