"""Claims about speed and memory, one module each, measured beside a peer in the same run."""
