"""The data of training: the order of samples, and their batches."""
