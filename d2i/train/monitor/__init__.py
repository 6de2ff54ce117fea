"""Reports of a training: losses, validation, sample images, throughput."""
