"""Records, streams, tokenizer, chat format and shards. No torch in this room."""
