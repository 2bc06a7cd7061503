"""Training records: reading, scanning, mixing, sampling and collating them."""
