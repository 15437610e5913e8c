"""Hidden states in, loss and gradient out: the specification, the fused loss and its engines."""
