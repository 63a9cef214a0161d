# Phase 2 of the cascade: the TokenBlock alone, on the contexts of the two blocks of cascade_phase1.py.
model = "cascade"
phase = "phase2"
init_from = "config/cascade_phase1.py"
dataset = "mini-gpt2"
learning_rate = 1e-3
decay_lr = False
grad_clip = 1.0
patience = 1
min_ppl_gain = 0.4
