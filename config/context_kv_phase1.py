# Phase 1 of Context-KV: the ContextBlock alone, without labels, on 100,000 tokens. Then context_kv_phase2.py.
model = "context_kv"
phase = "phase1"
num_tokens = 100_000
max_iterations = 100
convergence_threshold = 0.03
learning_rate = 0.003
batch_size = 5_000
gradient_clip = 2.0
context_noise = 0.05
early_stopping_threshold = 0.9
