"""The Llama model, its operators, checkpoint reading and writing. Only `config` and `budget` may be imported without torch."""
