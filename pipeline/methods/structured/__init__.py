"""The numbers of structured pruning: which blocks, heads and neurons go, and what makes up for them."""
