"""From scored groups to gradients: the objective, packed micro-batches, the policy's forward pass, its reference."""
