"""Training: rows of conversations, LoRA on a checkpoint, and the adapter merged into it."""
