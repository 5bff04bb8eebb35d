"""What a batch is, and in which order batches come. Knows nothing of models; rank and world size are arguments."""
