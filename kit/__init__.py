"""What the files above stand on; nobody comes to read it first."""
