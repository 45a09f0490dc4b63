"""Pure tensor functions that several stages use; each has a slow, obvious oracle in its test."""
