"""Command lines that few need: python -m tools.bench, python -m tools.compare."""
