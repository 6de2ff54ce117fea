"""Upload of a finished run's results to a repository on the Hugging Face hub (`d2i push`)."""
