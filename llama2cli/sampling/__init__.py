"""The generation engine: KV cache, prefill, decode, batching."""
