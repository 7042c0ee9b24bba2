"""The Llama model, its operators, checkpoints. Only `config` and `budget` may be imported without torch."""
