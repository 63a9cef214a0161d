# A layer for a laptop's CPU, on top of any model: python train.py config/mla_kv128.py config/laptop.py
# The same architecture four times narrower, so that every cache ratio stays what it is, and about a million tokens.
width_divisor = 4
block_size = 512
gradient_accumulation_steps = 1
max_iters = 500
warmup_iters = 50
learning_rate = 3e-3
min_lr = 3e-4
eval_interval = 100
eval_iters = 10
