"""What can run, and where: `machine` looks at this one, `cluster` at each node of a Ray cluster."""
