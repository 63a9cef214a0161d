# Phase 2 of Context-Pythia: all six layers read the contexts of the ContextBlock that config/phase1.py has trained.
model = "context"
phase = "phase2"
init_from = "config/phase1.py"
