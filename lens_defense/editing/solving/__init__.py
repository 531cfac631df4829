"""What a method that solves is given: C, fitted values, keys to keep, each layer's share (MEMIT's spread)."""
