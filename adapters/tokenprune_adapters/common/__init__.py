"""What every checkpoint needs, whatever the family: files and shards, storage formats, options, LoRA, tokenizers."""
