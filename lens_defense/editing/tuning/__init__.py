"""Changes that gradients make: losses of answers, Adam's descent, learned editors and their training."""
