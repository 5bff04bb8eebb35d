"""What a batch is, and the order of batches. Knows nothing of models; rank and world size are arguments."""
