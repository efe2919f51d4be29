"""How an extraction is doing: the live line, its log and its plot, and `kvpipe status`."""
