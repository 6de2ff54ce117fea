"""Fine-tuning a backbone on prepared shards with DeepSpeed (`d2i train`)."""
