"""Loading code that is independent of the family: files and shards, storage formats, options, LoRA, tokenizers."""
