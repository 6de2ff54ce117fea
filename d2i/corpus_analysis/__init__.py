"""Analysis of a corpus: its survey, leaks between its splits, captions for its images."""
