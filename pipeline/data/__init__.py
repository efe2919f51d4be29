"""From a data set to samples, window by window. Knows no teacher and no store."""
