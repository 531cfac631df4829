"""An edit for others: a LoRA adapter out and in, and the card of a saved model."""
