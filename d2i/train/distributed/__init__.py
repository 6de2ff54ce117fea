"""The ranks of a training: DeepSpeed, SLURM, and what ranks tell each other."""
