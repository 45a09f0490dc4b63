"""What several stages compute, each in plain torch and some in faster forms; ``choice`` picks one. Each has a slow,
obvious oracle in its test."""
