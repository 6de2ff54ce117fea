"""Features of images, from which the metrics are computed."""
