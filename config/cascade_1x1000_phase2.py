# Phase 2 of the cascade with one block of 1,000.
model = "cascade"
phase = "phase2"
init_from = "config/cascade_1x1000_phase1.py"
dataset = "mini-gpt2"
num_context_blocks = 1
context_dim = 1_000
learning_rate = 1e-3
decay_lr = False
grad_clip = 1.0
patience = 1
min_ppl_gain = 0.4
