"""What an extraction will take, before it begins: `kvpipe plan`."""
