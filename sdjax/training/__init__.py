"""Training: the steps, what they carry, and the loop around them."""
