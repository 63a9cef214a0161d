# Context-KV that saves more than half of the cache: four layers attend to contexts, 64.6% saved at 2,048 tokens (three
# layers save 48.0%).
model = "context_kv"
phase = "phase2"
init_from = "config/context_kv_phase1.py"
context_layers = [0, 1, 2, 3]
context_interval = 32
max_contexts = 32
