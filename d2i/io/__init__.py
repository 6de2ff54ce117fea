"""Files by URL: reading, atomic publishing, locks, checksums; and child processes."""
