# Phase 2 of the cascade with one block of 500.
model = "cascade"
phase = "phase2"
init_from = "config/cascade_1x500_phase1.py"
dataset = "mini-gpt2"
num_context_blocks = 1
context_dim = 500
learning_rate = 1e-3
decay_lr = False
grad_clip = 1.0
patience = 1
min_ppl_gain = 0.4
