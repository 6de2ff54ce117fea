"""The plan: which instances are prepared, and in which shard each of them will be."""
