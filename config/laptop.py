# A layer for a laptop's CPU, on top of any model: python train.py config/mla_kv128.py config/laptop.py
# The same architecture four times narrower, so that every cache ratio stays what it is, and half a million tokens.
width_divisor = 4
optimizer = "muon"
batch_size = 1  # many small steps: the most that so few tokens can teach
block_size = 512
gradient_accumulation_steps = 1
max_iters = 1000
warmup_iters = 50
learning_rate = 1e-2
min_lr = 3e-4
beta2 = 0.999  # most tokens are rare: what their rows of the tables saw has to be remembered for long
eval_interval = 200
eval_iters = 40
