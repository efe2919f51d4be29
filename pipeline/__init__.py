"""Text to store: runs a teacher, aligns and encodes its keys and values, and writes them with `kvstore`."""
