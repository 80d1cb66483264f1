"""Small complete programs: models of one's own on five axes."""
